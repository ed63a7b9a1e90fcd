"""A run at a glance, as one page and one picture, from its folder alone; no server is asked."""
