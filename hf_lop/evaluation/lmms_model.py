"""The lmms-eval model `hf_lop`: any image-text-to-text checkpoint, dense or pruned, or one pruned while it is loaded.

    python -m lmms_eval --model hf_lop --model_args pretrained=me/demo-lop30 --tasks pope
    python -m lmms_eval --model hf_lop --model_args pretrained=org/demo,pruner=org/lop-demo,ratio=0.3 --tasks pope

Importing this module imports lmms-eval, which takes seconds and sets the time-out of torch's process groups to 24 hours.
"""

import functools
import re
import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.caching.response_cache import ResponseCache
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import Collator
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_lop.errors import InvalidInputError, UnsupportedModelError
from hf_lop.evaluation.fingerprint import weight_fingerprint
from hf_lop.evaluation.loading import load_evaluated

# What a badly pruned model may say and MMBench's table of answers cannot hold: one such answer would lose all results.
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
GREEDY = {"max_new_tokens": 128, "temperature": 0.0, "top_p": None, "num_beams": 1}  # as lmms-eval's own wrappers


class LOPModel(lmms):  # type: ignore[misc]
    """A chat model of lmms-eval: images and text in, text out.

    Like lmms-eval's own wrappers it generates greedily unless the task says otherwise, and leaves stop strings (`until`) to
    the task's parser. It stays usable after a run. Its name in the response cache is a fingerprint of the weights.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        *,
        processor: Any = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        pruner: str | None = None,
        ratio: float | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        device: str | None = None,
        device_map: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        """Load a model, or wrap one that is loaded.

        Args:
            pretrained (`str` or `PreTrainedModel`): Hub id or folder; or a model in memory, which stays on its device.
            processor: its processor; by default that of `pretrained`.
            revision (`str`, *optional*): branch, tag or commit of `pretrained`.
            trust_remote_code (`bool`): run the model code of the repository.
            dtype (`str`): of the weights; "auto" for that of the checkpoint.
            attn_implementation (`str`, *optional*): see transformers.
            pruner (`str`, *optional*): Hub id or folder of a pruner; the model is cut after loading.
            ratio (`float`, *optional*): fraction of FFN neurons it removes.
            min_pixels (`int`, *optional*): fewest pixels an image is scaled to, where the image processor has such limits;
                for Qwen2.5-VL 200,704 by default, as in lmms-eval's own wrapper.
            max_pixels (`int`, *optional*): most pixels; for Qwen2.5-VL 1,605,632.
            device (`str`, *optional*): where to load to; with several processes each takes its own.
            device_map (`str`, *optional*): "auto" spreads one model over all GPUs.
            batch_size (`int`): questions per call of `generate`.
            max_batch_size (`int`, *optional*): accepted because lmms-eval passes it; the batch size is not searched.

        Raises:
            InvalidInputError: if an argument is out of its range, or there is no such model.
            UnsupportedModelError: if the model takes no images, or its processor has no chat template.
        """
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise InvalidInputError(f"batch_size is {batch_size!r}; pass a positive number, it is not searched here.")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        place = device if device and self._world_size == 1 else str(self.accelerator.device)
        self._model, self.processor = load_evaluated(
            pretrained,
            processor,
            pruner=pruner,
            ratio=ratio,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            revision=revision,
            trust_remote_code=trust_remote_code,
            dtype=dtype,
            device_map=device_map or place,
            **({"attn_implementation": attn_implementation} if attn_implementation else {}),
        )
        if not hasattr(self.processor, "tokenizer") or not getattr(self.processor, "chat_template", None):
            raise UnsupportedModelError(
                f"{type(self._model).__name__} has no image processor or no chat template, which lmms-eval tasks need. "
                "Use text tasks of lm-eval, or give the processor a chat template."
            )
        self.batch_size = int(batch_size)
        self.device = self._model.device
        self.max_length = 2048  # read by few tasks

    @property
    def model(self) -> PreTrainedModel:
        """The model."""
        return self._model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the processor."""
        return self.processor.tokenizer

    def __str__(self) -> str:
        """Return a name that changes with the weights and with what the processor does to images."""
        images = getattr(self.processor, "image_processor", None)
        limits = {name: getattr(images, name, None) for name in ("size", "min_pixels", "max_pixels")}
        return f"hf_lop:{weight_fingerprint(self._model)}:{limits}"

    def clean(self) -> None:
        """Free cached memory. The base class would delete the model, so that it could be used only once."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refuse: like all chat models of lmms-eval, this one only generates."""
        raise UnsupportedModelError(
            "hf_lop generates; tasks of lmms-eval that score given answers need a simple model."
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuse: conversations of several rounds are not supported."""
        raise UnsupportedModelError(
            "hf_lop answers in one round; run this task with the wrapper of the model's family."
        )

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answer every request `(context, doc_to_messages, gen_kwargs, doc_id, task, split)`.

        Returns:
            `list[GenerationResult]`: one per request, in their order; text without control characters.
        """
        # Longest questions first: a batch that does not fit fails at the start. A batch shares its generation arguments.
        order = Collator(
            [r.args for r in requests], lambda a: (-len(a[0]), a[0]), group_fn=lambda a: a[2], grouping=True
        )
        answers: list[Any] = []
        generated, seconds, padding = 0, 0.0, {"padding": True, "padding_side": "left"}
        bar = tqdm(total=len(requests), disable=self.rank != 0, desc="answering", unit="question")
        for chunk in order.get_batched(n=self.batch_size, batch_fn=None):
            chats = [self._messages(*args[1:]) for args in chunk]
            inputs = self.processor.apply_chat_template(
                chats,
                tokenize=True,
                return_dict=True,
                add_generation_prompt=True,
                processor_kwargs={"return_tensors": "pt", **(padding if len(chats) > 1 else {})},
            )
            inputs = {name: self._place(value) for name, value in inputs.items()}
            start = time.perf_counter()
            tokens = self._generate(inputs, chunk[0][2])
            seconds += time.perf_counter() - start
            for row, mask in zip(tokens, inputs["attention_mask"], strict=True):
                text = CONTROL_CHARACTERS.sub("", self.tokenizer.decode(row, skip_special_tokens=True))
                count = int((row != self.tokenizer.pad_token_id).sum())
                generated += count
                counts = TokenCounts(input_tokens=int(mask.sum()), output_tokens=count)
                answers.append(GenerationResult(text=text, token_counts=counts))
            bar.update(len(chunk))
        bar.close()
        log_metrics(seconds, generated, generated / seconds if seconds else 0.0, {"rank": self.rank})
        return list(order.get_original(answers))

    def _messages(self, to_messages: Any, _arguments: Any, doc_id: int, task: str, split: str) -> list[dict[str, Any]]:
        messages = ChatMessages(messages=to_messages(self.task_dict[task][split][doc_id]))
        _, videos, sounds = messages.extract_media()
        if videos or sounds:
            raise UnsupportedModelError(
                f"The task {task} has {'videos' if videos else 'sounds'}; hf_lop reads images and text. Run it with "
                "lmms-eval's wrapper of the model's family, which loads pruned models too."
            )
        chat: list[dict[str, Any]] = messages.to_hf_messages()
        return chat

    def _place(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(self.device, self._model.dtype if value.is_floating_point() else None)

    def _generate(self, inputs: dict[str, Any], arguments: dict[str, Any]) -> torch.Tensor:
        """Return the new tokens `[B, T] int64`."""
        wanted = {**GREEDY, **arguments}
        sample = (wanted["temperature"] or 0) > 0
        with torch.inference_mode():
            tokens: torch.Tensor = self._model.generate(  # type: ignore[operator]
                **inputs,
                do_sample=sample,
                temperature=wanted["temperature"] if sample else None,
                top_p=wanted["top_p"] if sample else None,
                top_k=wanted.get("top_k") if sample else None,
                num_beams=wanted["num_beams"],
                max_new_tokens=wanted["max_new_tokens"],
                pad_token_id=self.tokenizer.pad_token_id,
            )
        return tokens[:, inputs["input_ids"].shape[1] :]


def _key_on_weights() -> None:
    """Let lmms-eval's response cache tell our models apart by their weights.

    Its key holds `--model_args` as they were typed, so a folder that was written anew, or a branch that moved, would get the
    answers of the old weights.
    """
    original = ResponseCache.execute

    @functools.wraps(original)
    def execute(self: Any, lm: Any, reqtype: str, requests: list[Any]) -> Any:
        if isinstance(lm, LOPModel):
            self._model_fingerprint_hash = str(lm)
        return original(self, lm, reqtype, requests)

    ResponseCache.execute = execute


_key_on_weights()
