"""The text of new tokens as far as it is certain, and where it ends at a stop string."""

from collections.abc import Sequence

from llamalet.tokenizer import StreamDecoder


class TextStream:
    """Decodes tokens one by one, and ends before the stop string that is complete first.

    Text that may be the beginning of a stop string is held back until it is certain.
    """

    def __init__(self, decoder: StreamDecoder, stops: Sequence[str] = ()) -> None:
        """Decode with `decoder`; a text ends before any of `stops`, none of which is empty."""
        self._decoder, self._stops = decoder, tuple(stops)
        self._held, self._has_ended = "", False

    def push(self, token: int) -> tuple[str, bool]:
        """Return the text that is certain with this token, and whether a stop string ended it."""
        return self._add(self._decoder.push(token))

    def finish(self) -> str:
        """Return what is left at the end of the tokens: nothing after a stop string."""
        if self._has_ended:
            return ""
        text, ended = self._add(self._decoder.finish())
        return text if ended else text + self._held

    def _add(self, piece: str) -> tuple[str, bool]:
        """Take a piece of text; return what is certain, and whether a stop string ended it."""
        if not self._stops:
            return piece, False
        text = self._held + piece
        # Of several, the one that is complete first, so that it does not matter how the text is cut into pieces.
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._has_ended = True
            _, at = min(found)
            return text[:at], True
        n_held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held], False


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of a text that begins a stop string, but is not all of it."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0 and not stop.startswith(text[at:]):
        at = text.find(stop[0], at + 1)
    return len(text) - at if at >= 0 else 0
