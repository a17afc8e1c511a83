"""What a process without this package does with a repository that has its code; `test_sharing.py` runs it.

python tests/remote_code.py REPOSITORY FOLDER
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class PackageIsAbsent:
    """Finds no `transfusion`, whatever is installed."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> None:
        if name.split(".")[0] == "transfusion":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def refusals(auto_classes: dict[str, Any], repository: str) -> dict[str, str]:
    """How each auto class refuses to load the repository without `trust_remote_code`."""
    messages = {}
    for name, auto_class in auto_classes.items():
        try:
            auto_class.from_pretrained(repository)
        except ValueError as error:
            messages[name] = str(error)
    return messages


def use(model: Any, processor: Any) -> dict[str, Any]:
    """Text, a drawing, its caption, and text with drawings, as numbers."""
    import torch

    inputs = processor(text="a red heart", return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    generator = torch.Generator().manual_seed(0)
    drawn = model.generate_images(**inputs, num_inference_steps=2, generator=generator)
    pictures = processor.decode_images(drawn.latent_patches, drawn.image_grids)
    shown = processor(text="<image>", images=pictures, return_tensors="pt")
    caption = model.generate(**shown, max_new_tokens=4, do_sample=False)
    torch.manual_seed(0)
    both = model.generate(**inputs, generation_mode="interleaved", max_new_tokens=4, do_sample=False)
    rows = processor.post_process_multimodal_output(both)
    return {
        "written": written.tolist(),
        "drawn": drawn.latent_patches.tolist(),
        "size": pictures[0].size,
        "caption": caption.tolist(),
        "interleaved": [[part if isinstance(part, str) else part.size for part in row] for row in rows],
    }


def draw(pipeline: Any) -> list[float]:
    """What a diffusers pipeline draws, as numbers."""
    import torch

    generator = torch.Generator().manual_seed(0)
    latents = pipeline("a red heart", num_inference_steps=2, generator=generator, output_type="latent").images
    return latents.flatten().tolist()


def main(repository: str, folder: str) -> None:
    """Use the repository, save it again, use that, and write what came out to `<folder>/results.json`."""
    sys.meta_path.insert(0, PackageIsAbsent())
    from diffusers import DiffusionPipeline
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
    )
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    models = (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
    auto_classes = {
        auto_class.__name__: auto_class for auto_class in (AutoConfig, *models, AutoProcessor, AutoImageProcessor)
    }
    results: dict[str, Any] = {"refusals": refusals(auto_classes, repository)}
    loaded = {
        name: auto_class.from_pretrained(repository, trust_remote_code=True)
        for name, auto_class in auto_classes.items()
    }
    results["classes"] = {name: type(one).__name__ for name, one in loaded.items()}
    model, processor = loaded["AutoModel"], loaded["AutoProcessor"]
    results["first"] = use(model, processor)
    pipe = DiffusionPipeline.from_pretrained(repository, model=model, processor=processor, trust_remote_code=True)
    results["pipeline"] = draw(pipe)

    pipe.save_pretrained(Path(folder, "again"))
    options = {"pretrained_model_name_or_path": Path(folder, "again"), "trust_remote_code": True}
    results["again"] = use(AutoModel.from_pretrained(**options), AutoProcessor.from_pretrained(**options))
    results["modules"] = sorted(name for name in sys.modules if name.split(".")[0] == "transfusion")
    Path(folder, "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
