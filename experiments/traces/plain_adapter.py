"""An adapter of DSPy for small models, which do not follow its own marks of fields."""

from typing import Any

import dspy


class Plain(dspy.Adapter):
    """Instructions and fields as a small model can follow them: its answer is the one output field."""

    def format(self, signature: Any, demos: Any, inputs: Any) -> list[dict[str, Any]]:
        """A system message with the instructions, and a user's message with the fields."""
        fields = [f"{name.capitalize()}: {_text(inputs[name])}" for name in signature.input_fields]
        user = {"role": "user", "content": "\n".join(fields)}
        return [{"role": "system", "content": signature.instructions}, user]

    def parse(self, signature: Any, completion: str) -> dict[str, Any]:
        """The whole text, without space around it."""
        return {name: completion.strip() for name in signature.output_fields}


def _text(value: Any) -> str:
    return "".join(f"\n- {item}" for item in value) if isinstance(value, list) else str(value)
