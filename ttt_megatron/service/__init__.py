"""An exported model behind HTTP, with sessions that keep what they learnt."""
