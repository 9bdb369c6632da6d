"""Numbers in English: text that is the same on every machine."""

UNITS = "zero one two three four five six seven eight nine".split()
TENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
DECADES = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()


def words(n: int) -> str:
    """A number below a million in English."""
    if n >= 1000:
        return f"{words(n // 1000)} thousand" + (f" {words(n % 1000)}" if n % 1000 else "")
    if n >= 100:
        return f"{UNITS[n // 100]} hundred" + (f" and {words(n % 100)}" if n % 100 else "")
    if n >= 20:
        return DECADES[n // 10] + (f"-{UNITS[n % 10]}" if n % 10 else "")
    return TENS[n - 10] if n >= 10 else UNITS[n]
