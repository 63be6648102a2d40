"""What a family of decoders is: how its configuration file is read and written."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from sysdpo_jax.models.decoder_config import DecoderConfig
from sysdpo_jax.pretrained.base import CheckpointError, ConfigReader
from sysdpo_jax.pretrained.fields import with_ours
from sysdpo_jax.pretrained.handing_on import handed_on


@dataclass(frozen=True)
class Family:
    """One model_type of Hugging Face's decoders.

    architecture: the name of its class with a language-model head.
    read: the configuration that a config.json states; keys it does not know and values it cannot compute are a
        `CheckpointError`. The fields of OURS keep their defaults.
    express: the config.json's content that comes closest to a configuration; use `write`, which checks it.
    """

    model_type: str
    architecture: str
    read: Callable[[ConfigReader], DecoderConfig]
    express: Callable[[DecoderConfig], dict[str, Any]]

    def write(self, config: DecoderConfig, source: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The content of a config.json that `read`, and transformers, read back to the same model.

        Token ids belong to the tokenizer and the precision to the tensors, so neither is in it. Rotary frequencies are
        written under the names that every version of transformers reads.

        Args:
            config: the model.
            source: the config.json that it was read from, whose keys are kept where they still say the same model.

        Raises:
            CheckpointError: naming the first field whose value the family cannot express.
        """
        values = {"architectures": [self.architecture], "model_type": self.model_type, **self.express(config)}

        def read(values: Mapping[str, Any]) -> DecoderConfig:
            reader = ConfigReader(values, f"the {self.model_type} config.json to be written")
            return with_ours(self.read(reader), config)

        back = read(values)
        for field in fields(config):
            wanted, found = getattr(config, field.name), getattr(back, field.name)
            if wanted != found:
                raise CheckpointError(
                    f"a {self.model_type} checkpoint cannot say {field.name}={wanted!r} (it would be read as "
                    f"{found!r}): write it under another model_type"
                )
        return handed_on(source or {}, values, config, read)
