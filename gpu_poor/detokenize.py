"""From tokens to text, piece by piece as they come: whole characters, and nothing past the end.

A token is not a piece of text. It may hold half a character, and a tokenizer such as Llama's drops
the space that a text's first word begins with; so tokens are decoded together with those before
them, and text is held back while it ends in half a character or may be the start of a stop string.
The pieces of a :class:`Continuation` joined are its text, however the tokens are cut.
"""

from collections.abc import Collection, Iterable

#: What tokenizers decode half a character to.
REPLACEMENT = "\ufffd"


class Detokenizer:
    """Text of the tokens that follow a prompt.

    Args:
        tokenizer: a transformers tokenizer.
        prompt: token ids before the first that is added; they are not part of the text.
    """

    def __init__(self, tokenizer, prompt: Iterable[int] = ()):
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._read = len(self._ids)  # of these, the text is known already

    def add(self, token: int) -> str:
        """The text that is complete with one more token; "" if a character is not."""
        self._ids.append(token)
        before, text = self._decode(self._ids[: self._read]), self._decode(self._ids)
        if text.endswith(REPLACEMENT):
            return ""
        piece = text[len(before) :]
        # Before the next piece stands this one, if it can be seen: a special token cannot.
        first = self._read if piece else 0
        self._ids = self._ids[first:]
        self._read = len(self._ids)
        return piece

    def end(self) -> str:
        """What was held back: half a character, as the tokenizer shows it."""
        held, self._ids, self._read = self._ids[self._read :], [], 0
        return self._decode(held)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


class Continuation:
    """What a model writes after a prompt, up to an end token or a stop string.

    Args:
        ends: token ids that end the text; they and what follows them are not part of it.
        stops: strings that end the text, not empty; the same holds.
    """

    def __init__(self, tokenizer, prompt=(), ends: Collection[int] = (), stops=()):
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._ends, self._stops = ends, tuple(stops)
        self._held = ""
        self.done = False

    def add(self, token: int) -> str:
        """The text that is certain with one more token."""
        if self.done:
            return ""
        if token in self._ends:
            return self.end()
        self._held += self._detokenizer.add(token)
        return self._give(keep=True)

    def end(self) -> str:
        """The text that was held back; there is no more afterwards."""
        if self.done:
            return ""
        self._held += self._detokenizer.end()
        text = self._give(keep=False)
        self.done = True
        return text

    def _give(self, keep: bool) -> str:
        found = [at for at in map(self._held.find, self._stops) if at >= 0]
        self.done = bool(found)
        n = min(found, default=len(self._held) - (self._unsure() if keep else 0))
        text, self._held = self._held[:n], self._held[n:]
        return text

    def _unsure(self) -> int:
        """How many characters at the end may be the start of a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for n in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-n:]) for stop in self._stops):
                return n
        return 0


def text_of(tokenizer, prompt: Iterable[int], tokens: Iterable[int], ends=(), stops=()) -> str:
    """The text of a whole :class:`Continuation`."""
    continuation = Continuation(tokenizer, prompt, ends, stops)
    return "".join([*map(continuation.add, tokens), continuation.end()])
