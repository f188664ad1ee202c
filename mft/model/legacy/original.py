"""A checkpoint in its original format, which came with code of its own, read into native classes of transformers.

Nothing of the checkpoint's code is run: its config.json is translated by a class for each family (`families`), its
weights while they are read (`native`), its vocabulary into a fast tokenizer (`vocabulary`).
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.errors import UserError
from mft.model.causal_lm import CausalLM
from mft.model.model_folder import read_config

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

Values = dict[str, Any]

log = logging.getLogger(__name__)


@dataclass
class Original(CausalLM):
    """A checkpoint in its original format. Subclasses say which `model_type` they read, and translate its config."""

    model_type = ""  # of the original config.json; not a field

    def _warn_of_code(self) -> None:
        log.warning("model.trust_remote_code=true does nothing here: the code that comes with %s is not run", self.path)

    def original_config(self) -> Values:
        """Returns the checkpoint's config.json.

        Raises UserError when it is of another family or already quantised.
        """
        file = self._file("config.json")
        if file is None:
            raise UserError(f"model.path={self.path} has no config.json")
        values = read_config(file.parent)
        self._check_config(values)
        return values

    def _file(self, name: str) -> Path | None:
        """Returns a file of the checkpoint, fetched from the hub where it lies there; None if there is none of that
        name."""
        from transformers.utils import cached_file

        try:
            file = cached_file(self.source(), name, revision=self.revision, _raise_exceptions_for_missing_entries=False)
        except (OSError, ValueError) as error:
            raise UserError(f"model.path={self.path} cannot be loaded: {error}") from error
        return Path(file) if file else None

    def _check_path(self) -> None:
        super()._check_path()
        if values := read_config(Path(self.path).expanduser()):
            self._check_config(values)

    def _check_config(self, values: Values) -> None:
        if values.get("model_type") != self.model_type:
            raise UserError(
                f"model.path={self.path} is of model type {values.get('model_type')!r}, not {self.model_type!r}; "
                "use model=auto for a checkpoint that is already native"
            )
        if values.get("quantization_config") or values.get("quantization_bit"):
            raise UserError(
                f"model.path={self.path} holds weights that are quantised already; give the unquantised checkpoint, "
                "and peft=qlora to train beside 4 bits"
            )
        self.native(values)

    def _need(self, values: Values, **expected: Any) -> None:
        """Raises UserError where a setting differs from the only one that the native class can compute."""
        for name, value in expected.items():
            found = values.get(name, value)
            if found != value:
                raise UserError(
                    f"model.path={self.path}: {name}={found!r} in its config.json has no native counterpart, only "
                    f"{value!r} has"
                )

    def _get(self, values: Values, name: str) -> Any:
        if name not in values:
            raise UserError(f"model.path={self.path}: its config.json has no {name}, which {self.model_type} has")
        value = values[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise UserError(f"model.path={self.path}: {name}={value!r} in its config.json is no number above 0")
        return value

    def _divides(self, values: Values, part: str, whole: str) -> None:
        """Raises UserError where a count does not divide another."""
        if self._get(values, whole) % self._get(values, part):
            raise UserError(
                f"model.path={self.path}: {part}={values[part]} in its config.json does not divide {whole}="
                f"{values[whole]}"
            )

    def native(self, values: Values) -> tuple[str, str, Values]:
        """Returns the class of `native` that reads the weights, the name of the config class, and the config's
        values. Raises UserError for a configuration that has no native counterpart."""
        raise NotImplementedError

    def config(self) -> Any:
        import transformers

        from mft.model.legacy import native

        values = self.original_config()
        _, name, translated = self.native(values)
        # Token ids are given even where absent: native configs name those of their own releases by default.
        common = {name: values.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        common |= {"tie_word_embeddings": values.get("tie_word_embeddings", False)}
        common |= {name: values[name] for name in ("initializer_range",) if name in values}
        cls = getattr(native, name, None) or getattr(transformers, name)
        return cls(**(common | translated))

    # ── tokenizer ──

    vocabulary = ""  # name of the vocabulary's file; "" = one that transformers reads by itself; not a field

    def read_tokenizer(self) -> PreTrainedTokenizerBase:
        """Returns the folder's tokenizer.json if it has one, else its own vocabulary as a fast tokenizer.

        Raises UserError when there is no vocabulary, when it cannot be matched exactly, and when tokens were added to
        it that the original code does not add.
        """
        if not self.vocabulary or self._file("tokenizer.json"):
            from transformers import AutoTokenizer

            return self._from_pretrained(AutoTokenizer, config=self.config())
        file = self._file(self.vocabulary)
        if file is None:
            raise UserError(f"model.path={self.path} has neither {self.vocabulary} nor tokenizer.json")
        settings, added = self._json("tokenizer_config.json"), self._json("added_tokens.json")
        tokenizer = self.native_tokenizer(file, settings)
        added |= {entry["content"]: int(i) for i, entry in settings.get("added_tokens_decoder", {}).items()}
        for token, number in added.items():
            if tokenizer.get_vocab().get(token) != number:
                raise UserError(
                    f"model.path={self.path} adds the token {token!r} as {number} to its vocabulary, which the code it "
                    "came with does not; put a tokenizer.json into the folder"
                )
        return tokenizer

    def native_tokenizer(self, file: Path, settings: Values) -> PreTrainedTokenizerBase:
        """Returns the vocabulary of `file` as a fast tokenizer with the special tokens that the original code gives it;
        settings: of tokenizer_config.json."""
        raise NotImplementedError

    def _json(self, name: str) -> Values:
        file = self._file(name)
        return json.loads(file.read_text(encoding="utf-8")) if file else {}

    # ── model ──

    def model(
        self,
        dtype: torch.dtype,
        quantization: BitsAndBytesConfig | None = None,
        device_map: Any = None,
        compute_dtype: torch.dtype | None = None,
    ) -> PreTrainedModel:
        from mft.model.legacy import native

        reader = getattr(native, self.native(self.original_config())[0])
        model = self._load(reader, dtype, quantization, device_map, compute_dtype, config=self.config())
        model.__class__ = reader.__bases__[0]
        model.config.architectures = [type(model).__name__]
        model.__dict__.pop("_weight_conversions", None)  # or saving would try to write the original names
        return model

    def options(self) -> dict[str, Any]:
        """Returns what, beside the path, says how the checkpoint is to be read; `from_options` takes it."""
        common = {f.name for f in fields(CausalLM)}
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in common}
        return {"class": type(self).__name__, **own}
