"""A quantized model with its tokenizer: text in, text out.

    from gpu_poor.quantization import QuantizedModel

    model = QuantizedModel.from_pretrained("gpt2", bits=4)
    print(model.generate("The most important thing about memory is"))
    for piece in model.stream("Once upon a time"):
        print(piece, end="", flush=True)

Inside are the transformers model, ``.model``, and the tokenizer, ``.tokenizer``.
"""

import queue
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from gpu_poor import _needs_transformers
from gpu_poor.detokenize import Continuation, text_of
from gpu_poor.metrics_input import check_tokenizer, n_positions
from gpu_poor.modules import Holder
from gpu_poor.nn import QuantizedModule

with _needs_transformers("gpu_poor.quantization"):
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        StoppingCriteria,
        StoppingCriteriaList,
    )

#: What ``generate`` writes at most if neither the call nor the model's generation_config says.
MAX_NEW_TOKENS = 100

#: A text, or a chat: ``[{"role": "user", "content": "..."}, ...]``.
Prompt = str | Sequence[Mapping[str, object]]


class QuantizedModel(Holder):
    """A quantized causal LM and its tokenizer.

    What is not defined here is the model's own: ``model.config``, ``model.parameters()`` and all
    the rest. Functions of gpu_poor that take a model take this too (gpu_poor.modules.checked).

    Args:
        model: a transformers model that :func:`gpu_poor.quantize` or
            :func:`gpu_poor.make_it_work_hybrid` has quantized, or :func:`gpu_poor.load` read.
        tokenizer: its tokenizer.

    Raises:
        TypeError: one of them is something else.
        ValueError: nothing in the model is quantized, or it cannot generate.
    """

    def __init__(self, model: nn.Module, tokenizer):
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"QuantizedModel takes a model and its tokenizer, got {type(model).__name__}; "
                "QuantizedModel.from_pretrained(name) loads both"
            )
        check_tokenizer(tokenizer)
        if tokenizer is None:
            raise TypeError("QuantizedModel needs the tokenizer of its model, got None")
        if not any(isinstance(module, QuantizedModule) for module in model.modules()):
            raise ValueError("the model is not quantized: gpu_poor.quantize(model) does it")
        if not getattr(model, "can_generate", lambda: False)():
            raise ValueError(f"{type(model).__name__} cannot generate text: it has no LM head")
        self.model = model.eval()
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(
        cls, name: str | Path, bits: int | None = None, *, tokenizer=None, verbose=True, **options
    ) -> "QuantizedModel":
        """Load a model and quantize it while it is read, or load one that is quantized.

        Peak memory is the quantized model and one tensor. To calibrate on texts, which needs the
        float model, call ``gpu_poor.quantize(model, sample_inputs=...)`` and hand the result to
        this class.

        Args:
            name: a local folder or a name on the hub; of a float model, or one of the kinds that
                :func:`gpu_poor.load` reads.
            bits: 8 (default), 4 or 16. Not for a model that is quantized already.
            tokenizer: another one than that of ``name``, which a .gguf file has none of.
            verbose: print the receipt.
            **options: further ones of :class:`gpu_poor.GpuPoorConfig`, such as ``overrides``; the
                rest goes to ``from_pretrained`` of transformers.

        Raises:
            OSError: no such folder, and no such name on the hub.
            ValueError: bits or options of quantization for a model that is quantized.
        """
        from gpu_poor import hf, importers
        from gpu_poor.receipt import receipt

        if "sample_inputs" in options:
            raise ValueError(
                "from_pretrained reads one tensor at a time and cannot calibrate: use "
                "QuantizedModel(gpu_poor.quantize(float_model, sample_inputs=...), tokenizer)"
            )
        hub = {key: options[key] for key in hf.HUB if key in options}
        how = {key: options.pop(key) for key in _CONFIG_OPTIONS if key in options}
        if importers.find(name) is not None:
            if bits is not None:
                raise ValueError(f"{name} is quantized already: leave out bits")
            model = hf.load(name, **options, **how)
        elif getattr(AutoConfig.from_pretrained(name, **hub), "quantization_config", None):
            if bits is not None or how:
                given = ", ".join((["bits"] if bits is not None else []) + list(how))
                raise ValueError(f"{name} is quantized already: leave out {given}")
            model = hf.load(name, **options)
        else:
            config = hf.GpuPoorConfig(bits=8 if bits is None else bits, **how)
            model = AutoModelForCausalLM.from_pretrained(
                name, quantization_config=config, **options
            )
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(name, **hub)
        if verbose:
            print(receipt(model))
        return cls(model, tokenizer)

    # -- text -------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        max_new_tokens: int | None = None,
        *,
        stop: str | Sequence[str] = (),
        echo: bool = False,
        **options,
    ) -> str | list[str]:
        """Continue a text, answer a chat, or do that to several at once.

        Args:
            prompt: a string to continue; messages ``[{"role": ..., "content": ...}, ...]``, for
                which the tokenizer's chat template is used; or a list of either.
            max_new_tokens: at most; default: what the model's generation_config says, else 100,
                and no more than the context has room for.
            stop: strings at which the text ends, without them.
            echo: begin the result with the prompt (strings only).
            **options: of transformers' ``generate``, such as ``do_sample=True, temperature=0.8``.
                Whatever is not given is as the model's generation_config says: greedy if it says
                nothing. ``torch.manual_seed`` repeats what was sampled.

        Returns:
            What the model adds, without the prompt and without special tokens: a string, or a list
            of them for a list of prompts.

        Raises:
            TypeError: the prompt is of another kind.
            ValueError: an empty prompt, one that the context has no room for, messages without a
                chat template, a wrong ``stop`` or ``max_new_tokens``, or options that have no place
                here, such as ``num_return_sequences``.
        """
        prompts, several = _prompts(prompt)
        if echo and not all(isinstance(p, str) for p in prompts):
            raise ValueError("echo is for prompts that are strings, not for messages")
        rows = [self._encode(p) for p in prompts]
        stops, ends = _stops(stop), self._ends(options)
        arguments = self._arguments(rows, max_new_tokens, options)
        if stops:
            self._check_one_beam(options, "stop")
            watched = [Continuation(self.tokenizer, ids, ends, stops) for ids in rows]
            _add_criterion(arguments, _Watch(watched, arguments["input_ids"].shape[1]))
        out = self.model.generate(**arguments)[:, arguments["input_ids"].shape[1] :].tolist()
        texts = [
            (p if echo else "") + text_of(self.tokenizer, ids, tokens, ends, stops)
            for p, ids, tokens in zip(prompts, rows, out, strict=True)
        ]
        return texts if several else texts[0]

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        *,
        stop: str | Sequence[str] = (),
        **options,
    ) -> Iterator[str]:
        """The same text as :meth:`generate` of one prompt, in pieces as soon as they are certain.

        The model runs in a thread of its own, ahead of the one that reads. Closing the iterator
        (leaving a ``for`` loop that holds the only reference does) stops it after the token that
        it is at, and waits for that; what it raises is raised here. One beam only.

        Args, Raises: as of :meth:`generate`; mistakes in the arguments are raised at once.
        """
        prompts, several = _prompts(prompt)
        if several:
            raise TypeError("stream takes one prompt; generate takes a list of them")
        self._check_one_beam(options, "stream")
        ids = self._encode(prompts[0])
        continuation = Continuation(self.tokenizer, ids, self._ends(options), _stops(stop))
        return self._pieces(continuation, self._arguments([ids], max_new_tokens, options))

    def _pieces(self, continuation: Continuation, arguments: dict) -> Iterator[str]:
        pieces: queue.SimpleQueue = queue.SimpleQueue()
        watch = _Watch([continuation], arguments["input_ids"].shape[1], pieces.put)
        _add_criterion(arguments, watch)

        def work():
            try:
                self.model.generate(**arguments)
                pieces.put(continuation.end())
                pieces.put(None)
            except BaseException as error:  # the reader's to handle, whatever it is
                pieces.put(error)

        worker = threading.Thread(target=work, name="gpu_poor.stream", daemon=True)
        worker.start()
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                if piece:
                    yield piece
        finally:
            watch.cancelled = True
            worker.join()

    # -- arguments --------------------------------------------------------------------------

    def _encode(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt, of which there are some, and room for one more."""
        if isinstance(prompt, str):
            if not prompt:
                raise ValueError("the prompt is empty: give some text to continue")
            ids = self.tokenizer(prompt, verbose=False)["input_ids"]
        else:
            if not getattr(self.tokenizer, "chat_template", None):
                raise ValueError(
                    "messages need a chat template, and the tokenizer has none: this is no chat "
                    "model; give it a string to continue"
                )
            ids = self.tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_dict=True
            )["input_ids"]
        if not ids:
            raise ValueError(f"the prompt {prompt!r} has no tokens")
        if len(ids) >= (positions := n_positions(self.model)):
            raise ValueError(
                f"the prompt has {len(ids)} tokens and the model's context {positions}, which "
                "leaves no room for an answer"
            )
        return ids

    def _arguments(self, rows: list[list[int]], max_new_tokens: int | None, options: dict) -> dict:
        """Arguments of transformers' ``generate``: prompts padded on the left, and lengths."""
        if stray := sorted(options.keys() & _OURS):
            raise ValueError(f"{stray[0]} is not taken: {_OURS[stray[0]]}")
        longest = max(map(len, rows))
        room = n_positions(self.model) - longest
        if max_new_tokens is None:
            wanted = self._said(options, "max_new_tokens") or MAX_NEW_TOKENS
            max_new_tokens = min(wanted, room)
        elif type(max_new_tokens) is not int or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be an integer >= 1, got {max_new_tokens!r}")
        elif max_new_tokens > room:
            raise ValueError(
                f"max_new_tokens={max_new_tokens} does not fit: the prompt has {longest} tokens, "
                f"and the model's context is {longest + room}"
            )
        pad = self._said(options, "pad_token_id")
        if pad is None:  # masked before a prompt, cut off after a text: any token does
            pad = next(iter(self._ends(options)), 0)
        padded = [[pad] * (longest - len(ids)) + ids for ids in rows]
        mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows]
        device = self.model.device
        return options | {
            "input_ids": torch.tensor(padded, device=device),
            "attention_mask": torch.tensor(mask, device=device),
            "max_new_tokens": max_new_tokens,
            "pad_token_id": pad,
            "num_return_sequences": 1,
            "return_dict_in_generate": False,
        }

    def _ends(self, options: dict) -> list[int]:
        """The token ids that end a text."""
        ends = self._said(options, "eos_token_id")
        ends = self.tokenizer.eos_token_id if ends is None else ends
        return [] if ends is None else torch.as_tensor(ends).reshape(-1).tolist()

    def _said(self, options: dict, name: str):
        """An option of ``generate``: as the call, the config given with it, or the model's says."""
        configs = options.get("generation_config"), self.model.generation_config
        said = (options.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in said if value is not None), None)

    def _check_one_beam(self, options: dict, what: str) -> None:
        if (beams := self._said(options, "num_beams") or 1) > 1:
            raise ValueError(f"{what} works with one beam, got num_beams={beams}")

    # -- the model's own --------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, **options) -> None:
        """Save the model and the tokenizer for :meth:`from_pretrained`."""
        self.model.save_pretrained(folder, **options)
        self.tokenizer.save_pretrained(folder)

    def to(self, *args, **kwargs) -> "QuantizedModel":
        """Move the model, as ``nn.Module.to``."""
        self.model.to(*args, **kwargs)
        return self

    def __call__(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "model":  # copies and pickles ask before there is one
            raise AttributeError(name)
        return getattr(self.model, name)

    def __repr__(self) -> str:
        return f"QuantizedModel({self.model})"


#: Options of GpuPoorConfig that are choices; bits is a parameter of its own.
_CONFIG_OPTIONS = (
    "overrides",
    "strategy",
    "activation",
    "include",
    "exclude",
    "critical_layers",
    "allow_partial",
)


#: Options of transformers' generate that have no place here, and what to do instead.
_OURS = {
    "attention_mask": "the prompts say what is padding",
    "input_ids": "give the text; model.model.generate takes tokens",
    "inputs": "give the text; model.model.generate takes tokens",
    "inputs_embeds": "give the text; model.model.generate takes embeddings",
    "max_length": "it is max_new_tokens here, and the prompt does not count",
    "num_return_sequences": "give the prompt several times",
    "return_dict_in_generate": "the result is text; model.model.generate has the rest",
    "stop_strings": "it is stop here",
    "streamer": "model.stream gives the pieces",
    "tokenizer": "QuantizedModel has one",
}


class _Watch(StoppingCriteria):
    """Follows the texts of a batch while they are generated, and ends those that are done.

    Args:
        rows: the texts, one for each row.
        n_prompt: tokens that are not theirs.
        give: called with each piece of text, of a batch of one.
    """

    def __init__(self, rows: list[Continuation], n_prompt: int, give=lambda piece: None):
        self.rows, self.give, self.cancelled = rows, give, False
        self._seen = n_prompt

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        new = input_ids[:, self._seen :].tolist()
        self._seen = input_ids.shape[1]
        for row, tokens in zip(self.rows, new, strict=True):
            for token in tokens:
                self.give(row.add(token))
        done = [row.done or self.cancelled for row in self.rows]
        return torch.tensor(done, device=input_ids.device)


def _add_criterion(arguments: dict, criterion: StoppingCriteria) -> None:
    others = arguments.get("stopping_criteria") or []
    arguments["stopping_criteria"] = StoppingCriteriaList([*others, criterion])


def _stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str | int) else tuple(stop or ())
    if not all(isinstance(s, str) and s for s in stops):
        raise ValueError(f"stop must be a string or strings, none of them empty, got {stop!r}")
    return stops


def _is_chat(prompt: object) -> bool:
    return (
        isinstance(prompt, Collection)
        and len(prompt) > 0
        and all(isinstance(message, Mapping) for message in prompt)
    )


def _prompts(prompt: object) -> tuple[list[Prompt], bool]:
    """The prompts, and whether they are several.

    Raises:
        TypeError: neither a string, messages nor a list of those.
        ValueError: an empty list.
    """
    if isinstance(prompt, str) or _is_chat(prompt):
        return [prompt], False
    if isinstance(prompt, list | tuple):
        if not prompt:
            raise ValueError("there is no prompt in the list")
        if all(isinstance(p, str) or _is_chat(p) for p in prompt):
            return list(prompt), True
    raise TypeError(
        "the prompt must be a string, messages with roles, or a list of those, got "
        f"{type(prompt).__name__}"
    )
