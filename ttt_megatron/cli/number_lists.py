"""Options that take several numbers, with commas between."""

from ttt_megatron.errors import UserError


def whole_numbers(text: str | None, option: str) -> list[int]:
    """The numbers, without repetitions, as given; none for None.

    Raises UserError for what is no list of whole numbers.
    """
    if text is None:
        return []
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(
            f"--{option} {text}: give whole numbers with commas between, such as 512,1024"
        ) from None
    return list(dict.fromkeys(numbers))
