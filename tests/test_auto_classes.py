"""What `import transfusion` registers, seen from fresh processes: nothing else may have been imported before."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import pipeline as task_pipeline

import transfusion
from tests.test_pipeline import make_pipeline
from tests.test_tasks import writing_pipeline


ROOT = Path(transfusion.__file__).parents[1]

# Everything loads by transformers' and diffusers' own names; prints a digest of what each way to draw gave.
PROGRAM = """
import hashlib, json, sys
{imports}
import torch
from diffusers import DiffusionPipeline
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText,
    AutoModelForMultimodalLM, AutoProcessor, pipeline,
)

path = sys.argv[1]
found = {{}}
for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    found[auto_class.__name__] = type(auto_class.from_pretrained(path)).__name__
for auto_class in (AutoConfig, AutoImageProcessor, AutoProcessor):
    found[auto_class.__name__] = type(auto_class.from_pretrained(path)).__name__

loaded = [DiffusionPipeline.from_pretrained(path)]
from diffusers import AutoPipelineForText2Image

loaded.append(AutoPipelineForText2Image.from_pretrained(path))
loaded.append(transfusion.TransfusionPipeline.from_pretrained(path))
assert {{type(one) for one in loaded}} == {{transfusion.TransfusionPipeline}}
digests = []
for draw in (*loaded, pipeline("text-to-image", model=path)):
    drawn = draw("a heart", num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    image = drawn.images[0] if hasattr(drawn, "images") else drawn
    digests.append(hashlib.sha256(image.tobytes()).hexdigest())
assert "torchvision" not in sys.modules
print(json.dumps([found, digests]))
"""

ORDERS = {
    "transfusion_first": "import transfusion\nassert 'diffusers' not in sys.modules",
    "diffusers_first": "from diffusers import AutoPipelineForText2Image\nimport transfusion",
}


@pytest.mark.parametrize("imports", ORDERS.values(), ids=ORDERS)
def test_every_loader_knows_a_checkpoint_in_a_fresh_process(imports: str, tmp_path: Path) -> None:
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path)
    command = [sys.executable, "-c", PROGRAM.format(imports=imports), str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found, digests = json.loads(result.stdout.splitlines()[-1])
    model = "TransfusionForMultimodalGeneration"
    assert found == {
        "AutoModel": model,
        "AutoModelForCausalLM": model,
        "AutoModelForImageTextToText": model,
        "AutoModelForMultimodalLM": model,
        "AutoConfig": "TransfusionConfig",
        "AutoImageProcessor": "TransfusionImageProcessor",
        "AutoProcessor": "TransfusionProcessor",
    }
    image = pipeline("a heart", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert digests == [hashlib.sha256(image.tobytes()).hexdigest()] * 4


@pytest.mark.parametrize("batch_size", [1, 2])
def test_text_generation_writes_with_the_tokenizer_alone(batch_size: int, tmp_path: Path) -> None:
    """As evaluation harnesses do, which know causal language models."""
    task = task_pipeline("text-generation", model=writing_pipeline(tmp_path))
    arguments = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False, "batch_size": batch_size}
    answers = task(["a red heart\n", "\n", "a"], **arguments)
    assert [answer[0]["generated_text"] for answer in answers] == ["ab", "ab", "b"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = AutoTokenizer.from_pretrained(tmp_path)("a red heart\n", return_tensors="pt")
    labels = tokens["input_ids"]
    expected = torch.nn.functional.cross_entropy(loaded(**tokens).logits[0, :-1], labels[0, 1:])
    torch.testing.assert_close(loaded(**tokens, labels=labels).loss, expected)
