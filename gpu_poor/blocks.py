"""A decoder run block by block, so that no more of it is needed at a time than one block.

Calibration and the recording of a reference send hidden states through one block after the other.
That is the model's own computation only if its blocks do nothing but pass hidden states on, which
:class:`Blocks` tries out on a few tokens: no table of architectures is involved. The parts before
the first block and after the last one are the model's own, run with blocks that do nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gpu_poor import memory
from gpu_poor.chains import TOLERANCE
from gpu_poor.modules import Reached, forwards, hooked
from gpu_poor.plan import block_list
from gpu_poor.spill import Spilled

#: Of a text that blocks are tried out on.
PROBE_TOKENS = 8


class Call(NamedTuple):
    """What a block is called with beside hidden states."""

    args: tuple
    kwargs: dict


class Blocks:
    """The blocks of a decoder, and what each of them is called with.

    Args:
        model: in the mode in which it is to run; float weights that lie in mapped files are let go
            of, block by block, as soon as they have been read.
        ids: some token ids that the model knows, int64 ``[1, T]``.

    Raises:
        ValueError: the model cannot be run block by block; the message says why.
    """

    def __init__(self, model: nn.Module, ids: Tensor):
        self.model = model
        self.name = block_list(model)
        self.modules = list(model.get_submodule(self.name))
        self.device = next(model.parameters()).device
        #: ``{shape of ids: a call for each block}``; texts of one shape make no difference.
        self.calls: dict[tuple, list[Call]] = {}
        #: What each block answers beside hidden states; None if nothing, not even a tuple.
        self.beside: list[tuple | None] = []
        #: Size of the vocabulary that the model answers for; None if it answers no logits.
        self.n_vocab: int | None = None
        self._try(ids[:1, :PROBE_TOKENS])

    def enter(self, ids: Tensor) -> Tensor:
        """The hidden states ``[B, T, H]`` before the first block, of ids ``[B, T]``.

        Raises:
            ValueError: what the blocks are called with depends on more than the shape of ids.
        """
        with self._doing_nothing(), self._watching(stop=True) as seen, suppress(Reached):
            self._forward(ids)
        self._remember(ids, seen)
        return seen[0].hidden

    def run(self, i: int, hidden: Tensor, block: nn.Module | None = None) -> Tensor:
        """The hidden states after block ``i``, or after another module in its place."""
        args, kwargs = self.calls[tuple(hidden.shape[:2])][i]
        return _hidden((block or self.modules[i])(hidden, *args, **kwargs))

    def leave(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """The logits ``[B, T, V]`` of ids, from the hidden states after the last block."""
        with self._doing_nothing(last=hidden):
            return self._forward(ids).logits

    def _forward(self, ids: Tensor):
        return self.model(input_ids=ids.to(self.device), use_cache=False)

    def _try(self, ids: Tensor) -> None:
        """Run two texts as a whole, then both of them block by block.

        Raises:
            ValueError: the blocks tell them apart by more than hidden states, or their own
                computation comes out differently.
        """
        texts = ids, ids.min() + ids.max() - ids  # ids within the same range
        states, expected = [], []
        for each in texts:
            answers: list = []
            with self._watching(answers) as seen:
                out = self._forward(each)
            self._remember(each, seen)
            states.append(seen[0].hidden)
            expected.append(_hidden(answers[-1]).float())
        logits = getattr(out, "logits", None)
        self.n_vocab = None if logits is None else logits.shape[-1]
        self.beside = [None if isinstance(a, Tensor) else tuple(a[1:]) for a in answers]
        if not all(bool(each.isfinite().all()) for each in expected):
            return  # what is wrong shows with the data, and is said of the data
        for i, block in enumerate(self.modules):
            states = [self.run(i, hidden) for hidden in states]
            memory.let_go(block)
        for hidden, right in zip(states, expected, strict=True):
            if float((hidden.float() - right).abs().max()) > TOLERANCE * float(right.abs().max()):
                raise ValueError(
                    f"the blocks of {type(self.model).__name__} do more than pass hidden states "
                    "on: it cannot be run block by block"
                )

    def _remember(self, ids: Tensor, seen: list["_Seen"]) -> None:
        if [each.block for each in seen] != self.modules:
            raise ValueError(
                f"{type(self.model).__name__} does not run its blocks once each, in order: it "
                "cannot be run block by block"
            )
        calls = [each.call for each in seen]
        known = self.calls.setdefault(tuple(ids.shape), calls)
        if not _same(calls, known):
            raise ValueError(
                f"the blocks of {type(self.model).__name__} read more of a text than hidden "
                "states: it cannot be run block by block"
            )

    @contextmanager
    def _watching(self, answers: list | None = None, stop: bool = False) -> Iterator[list["_Seen"]]:
        """What the blocks are called with meanwhile and, if asked for, what they answer.

        Args:
            stop: raise Reached when as many have been called as there are.
        """
        seen: list[_Seen] = []

        def before(block, args, kwargs):
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states", None)
            if not isinstance(hidden, Tensor) or hidden.dim() != 3:
                raise ValueError(
                    f"{type(block).__name__} takes no hidden states [B, T, H]: the model cannot be "
                    "run block by block"
                )
            seen.append(_Seen(block, hidden, Call(args[1:], kwargs)))
            if stop and len(seen) == len(self.modules):
                raise Reached

        def after(block, args, answer):
            answers.append(answer)
            memory.let_go(block)

        handles = [m.register_forward_pre_hook(before, with_kwargs=True) for m in self.modules]
        if answers is not None:
            handles += [m.register_forward_hook(after) for m in self.modules]
        with hooked(handles):
            yield seen

    def _doing_nothing(self, last: Tensor | None = None) -> AbstractContextManager[None]:
        """Blocks that answer what they are given; the last one ``last``, if there is one."""
        answers = [None] * (len(self.modules) - 1) + [last]
        passing = map(_pass_on, self.beside, answers)
        return forwards(dict(zip(self.modules, passing, strict=True)))


class Answers:
    """What a module answers, kept in a file: with one batch as often as need be, computed once.

    Args:
        module: answers a tensor, or a tuple of one and of None; else it is computed each time.
    """

    def __init__(self, module: nn.Module):
        self._compute, self._kept = module.forward, Spilled(in_memory=0)
        #: ``{(batch, which call meanwhile): (place, what comes beside the tensor)}``.
        self._places: dict[tuple[int, int], tuple[int, tuple | None]] = {}
        self._batch = self._n_calls = 0
        module.forward = self._answer

    def start(self, batch: int) -> None:
        """The calls from now on are those of a batch from its beginning."""
        self._batch, self._n_calls = batch, 0

    def _answer(self, *args, **kwargs):
        key = self._batch, self._n_calls
        self._n_calls += 1
        if key in self._places:
            place, beside = self._places[key]
            return self._kept[place] if beside is None else (self._kept[place], *beside)
        answer = self._compute(*args, **kwargs)
        beside = None if isinstance(answer, Tensor) else tuple(answer[1:])
        if beside is None or all(each is None for each in beside):
            self._places[key] = len(self._kept), beside
            self._kept.append(_hidden(answer))
        return answer


class _Seen(NamedTuple):
    block: nn.Module
    hidden: Tensor
    call: Call


def _pass_on(beside: tuple | None, answer: Tensor | None) -> Callable:
    def forward(*args, **kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = hidden if answer is None else answer
        return hidden if beside is None else (hidden, *beside)

    return forward


def _hidden(answer: object) -> Tensor:
    return answer if isinstance(answer, Tensor) else answer[0]


def _same(a: object, b: object) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    return True
