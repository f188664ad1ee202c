"""A checkpoint in its original format, which shipped its own code: checked, and converted when it is
first used.

Nothing of the checkpoint's code is run: its config.json is translated by a class for each family
(`families`), its weights are renamed and split (`layout`, `convert`), its vocabulary becomes a fast tokenizer
(`vocabulary`). What loads, trains, saves and merges sees the native folder alone; identity and fingerprints
are those of the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft.errors import UserError
from mft.files.cache_folder import default_cache_dir, made_once
from mft.files.checksums import seal
from mft.model.causal_lm import CausalLM
from mft.model.legacy.convert import write_native
from mft.model.legacy.layout import Layout
from mft.model.model_folder import read_config
from mft.model.origin import CONVERTED, Origin, convert_words, write_note
from mft.model.safetensors_header import INDEX
from mft.model.save import write_tokenizer_files
from mft.model.transformers_private import fetched

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

Values = dict[str, Any]
"""Of a JSON file."""

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
"""Numbers of config.json that have their native names in most formats."""

CONVERTER = 1
"""Raised where the same checkpoint would become another native folder, so that those in caches are made
again."""

log = logging.getLogger(__name__)


@dataclass
class Original(CausalLM):
    """A checkpoint in its original format. Subclasses say which `model_type` they read, and translate its
    config."""

    code_notice = "model.trust_remote_code=true has no effect: the code that comes with %s is not run"

    cache_dir: str = ""
    """Where the native folder is kept, under native/; "" = $MFT_CACHE, else ~/.cache/mft."""

    choice = ""  # a choice of model= that reads such a checkpoint; not a field
    model_type = ""  # of the original config.json; not a field
    vocabulary = ""  # name of the vocabulary's file; "" = transformers reads it; not a field

    def native(self, values: Values) -> tuple[Layout, str, Values]:
        """Returns the layout of the weights, the name of the config class, and the config's
        values. Raises UserError for a configuration that has no native counterpart."""
        raise NotImplementedError

    def native_tokenizer(self, file: Path, settings: Values) -> tuple[Tokenizer, Values]:
        """Returns the vocabulary of `file` as a fast tokenizer, and the special tokens that the original code
        gives it, by their names in transformers; settings: of tokenizer_config.json."""
        raise NotImplementedError

    def normalises(self, values: Values) -> bool:
        """Whether the output layer of a checkpoint with this config.json scales its rows to length 1."""
        return False

    # ── checks of config.json ──

    def _refusal(self, reason: str) -> UserError:
        return UserError(f"model.path={self.path}{reason}")

    def _check_path(self) -> None:
        super()._check_path()
        if values := self._folder_config():
            self._check_config(values)

    def _check_config(self, values: Values) -> None:
        kind = values.get("model_type")
        if kind != self.model_type:
            native = "use model=auto for a checkpoint that is already native"
            raise self._refusal(f" is of model type {kind!r}, not {self.model_type!r}; {native}")
        if values.get("quantization_config") or values.get("quantization_bit"):
            raise self._refusal(" is quantised already; give the unquantised checkpoint, with peft=qlora")
        self.native(values)

    def _need(self, values: Values, **expected: object) -> None:
        """Raises UserError where a setting differs from the only one that the native class can compute."""
        for name, value in expected.items():
            if values.get(name, value) != value:
                setting = f"{name}={values[name]!r} in its config.json"
                raise self._refusal(f": {setting} has no native counterpart, only {value!r} has")

    def _get(self, values: Values, name: str) -> Any:
        """Returns a number of config.json."""
        if name not in values:
            raise self._refusal(f": its config.json has no {name}, which {self.model_type} has")
        value = values[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise self._refusal(f": {name}={value!r} in its config.json must be a number greater than 0")
        return value

    def _translated(self, values: Values, *same: str, **renamed: str) -> Values:
        """Returns the numbers of config.json that have the same name natively, and those of other names, as
        native="original"."""
        names = {name: name for name in same} | renamed
        return {native: self._get(values, name) for native, name in names.items()}

    def _divides(self, values: Values, part: str, total: str) -> None:
        """Raises UserError where a count does not divide another."""
        if self._get(values, total) % self._get(values, part):
            setting = f"{part}={values[part]} in its config.json"
            raise self._refusal(f": {setting} does not divide {total}={values[total]}")

    # ── what lies at model.path ──

    def _file(self, name: str) -> Path | None:
        """Returns a file of the checkpoint, fetched from the hub where it lies there; None if there is none
        of that name."""
        try:
            return fetched(self.location(), name, self.revision)
        except (OSError, ValueError) as error:
            raise self._refusal(f" cannot be loaded: {error}") from error

    def _json(self, name: str) -> Values:
        file = self._file(name)
        return json.loads(file.read_text(encoding="utf-8")) if file else {}

    def original_config(self) -> Values:
        """Returns the checkpoint's config.json.

        Raises UserError when it is of another family or already quantised.
        """
        file = self._file("config.json")
        if file is None:
            raise self._refusal(" has no config.json")
        values = read_config(file.parent)
        self._check_config(values)
        return values

    def config(self) -> PreTrainedConfig:
        import transformers

        from mft.model.legacy import native

        values = self.original_config()
        _, name, translated = self.native(values)
        # Token ids are set even where absent: native configs name those of their own releases by default.
        common = {name: values.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        common |= {"tie_word_embeddings": values.get("tie_word_embeddings", False)}
        common |= {name: values[name] for name in ("initializer_range",) if name in values}
        cls = getattr(native, name, None) or getattr(transformers, name)
        return cls(**(common | translated))

    def read_tokenizer(self) -> PreTrainedTokenizerBase:
        """Returns the folder's tokenizer.json if it has one, else its own vocabulary as a fast tokenizer.

        Raises UserError when there is no vocabulary, when it cannot be matched exactly, and when tokens were
        added to it that the original code does not add.
        """
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        if not self.vocabulary or self._file("tokenizer.json"):
            return self._pretrained(self.location()).read(AutoTokenizer, config=self.config())
        file = self._file(self.vocabulary)
        if file is None:
            raise self._refusal(f" has neither {self.vocabulary} nor tokenizer.json")
        # Tokens that were added to the release would be missing here, and their text become pieces.
        settings, added = self._json("tokenizer_config.json"), self._json("added_tokens.json")
        backend, names = self.native_tokenizer(file, settings)
        names |= {"tokenizer_object": backend, "clean_up_tokenization_spaces": False}
        tokenizer = PreTrainedTokenizerFast(**names)
        added |= {entry["content"]: int(i) for i, entry in settings.get("added_tokens_decoder", {}).items()}
        for token, number in added.items():
            if tokenizer.get_vocab().get(token) != number:
                raise self._refusal(
                    f" adds the token {token!r} as {number} to its vocabulary, which the code it came with "
                    "does not; put a tokenizer.json into the folder"
                )
        return tokenizer

    # ── the native folder ──

    def source(self) -> str:
        """Returns the native folder of this checkpoint, converted into the cache when it is first needed."""
        options = {"class": self.public_name, **self._own_options(), "version": CONVERTER}
        # Contents, not the path: the same checkpoint elsewhere is not converted again.
        key = json.dumps([options, sorted(self.fingerprints().items())], sort_keys=True)
        cache = Path(self.cache_dir or default_cache_dir()).expanduser().resolve()
        folder = cache / "native" / hashlib.sha256(key.encode()).hexdigest()[:16]
        return str(made_once(folder, self._write_to_cache))

    def _write_to_cache(self, folder: Path) -> None:
        self.convert(folder, plain_head=False)
        with suppress(UserError):  # a vocabulary is refused when the tokenizer is used, not for its weights
            write_tokenizer_files(self.read_tokenizer(), folder)
        write_note(folder, CONVERTED, Origin(self.location(), self.revision, self.fingerprint()))
        seal(folder)

    def convert(self, folder: Path, plain_head: bool = True) -> None:
        """Writes config and weights as a plain native folder, which anybody's transformers can load.

        plain_head: see `write_native`.
        """
        values = self.original_config()
        layout, norm_head = self.native(values)[0], self.normalises(values)
        who = f"model.path={self.path}"
        write_native(who, self._fetched(), self.config(), layout, folder, norm_head, plain_head)

    def _fetched(self) -> Path:
        """Returns the folder of the weight files, which are fetched where the checkpoint lies on the hub."""
        if Path(self.location()).is_dir():
            return Path(self.location())
        names = set(self._json(INDEX).get("weight_map", {}).values()) or {"model.safetensors"}
        self._file("generation_config.json")
        if None in [self._file(name) for name in sorted(names)]:
            raise self._refusal(" has no *.safetensors files; pickled weights are not loaded")
        config = self._file("config.json")
        assert config is not None
        return config.parent

    def conversion(self) -> str:
        words = {"": self.choice, ".path": self.path, ".revision": self.revision}
        return convert_words(words | {f".{name}": value for name, value in self._own_options().items()})

    def _own_options(self) -> Values:
        """Returns what, beside the path, says how the checkpoint is to be read."""
        common = {f.name for f in fields(Original)}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in common}
