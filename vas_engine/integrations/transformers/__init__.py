"""transformers: value-guided `generate` on a model that is already loaded.

    model = load_values(AutoModelForCausalLM.from_pretrained(name), {"kind": "path/to/value"}, tokenizer)
    model.generate(**inputs, custom_generate=vas_generate, values={"kind": 2.0}, max_new_tokens=64)

`vas_generate` runs this engine in place of generate's own loop; `ValueLogitsProcessor` works inside that loop, for
value models only.
"""

from vas_engine.integrations.transformers.engines import load_values
from vas_engine.integrations.transformers.generate import GuidedOutput, vas_generate
from vas_engine.integrations.transformers.processor import ValueLogitsProcessor

__all__ = ["GuidedOutput", "ValueLogitsProcessor", "load_values", "vas_generate"]
