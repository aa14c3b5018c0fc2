"""What an import loads, seen in a fresh interpreter: the cloud's trust boundary and the quick start of the command.

`transformers` loads its model classes through `modeling_utils`, which imports `tokenizers`, and in some of its versions
tokenizers too, whether wanted or not. So the cloud's test looks for what turns text into ids (the tokenizer of any
model, the fast base class, and the class that finds one by name) beyond what `transformers` loads with a model anyway.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING

from tests.architecture.source import all_modules

if TYPE_CHECKING:
    from pathlib import Path

PRIVATE_SIDE = re.compile(
    r"tidelock\.(backbone|cache|cli|data|device|peft|pool|privacy|report|run)(\..*)?"
    r"|(datasets|peft|trl)(\..*)?"
)
TOKENIZER = re.compile(
    r"transformers\.(tokenization_utils_tokenizers|models\.auto\.tokenization_auto|models\..*\.tokenization_.*)"
)
HEAVY = re.compile(r"(accelerate|datasets|grpc|numpy|peft|torch|transformers|trl)")


def loaded_after(code: str, folder: Path) -> set[str]:
    """Return the names of all modules that a fresh interpreter holds after running the code."""
    probe = f"{code}\nimport json, sys\nsys.stderr.write(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return set(json.loads(done.stderr.splitlines()[-1]))


MODEL_CLASSES = "from transformers import AutoModelForCausalLM, LlamaForCausalLM"


def tokenizers_of_our_own(loaded: set[str], folder: Path) -> list[str]:
    """Return the tokenizers among loaded modules that transformers' model classes do not bring with them."""
    return matching(TOKENIZER, loaded - loaded_after(MODEL_CLASSES, folder))


def matching(pattern: re.Pattern[str], modules: set[str]) -> list[str]:
    return sorted(name for name in modules if pattern.fullmatch(name))


def test_the_cloud_service_loads_nothing_of_the_private_side(tmp_path: Path) -> None:
    loaded = loaded_after("import tidelock.cloud.service", tmp_path)
    assert "tidelock.cloud.service" in loaded
    assert matching(PRIVATE_SIDE, loaded) == []
    assert tokenizers_of_our_own(loaded, tmp_path) == []


def test_no_module_of_the_cloud_loads_the_private_side_even_with_a_model(tmp_path: Path) -> None:
    names = [module.name for module in all_modules() if module.name.startswith("tidelock.cloud")]
    code = "\n".join(f"import {name}" for name in names)
    loaded = loaded_after(f"{code}\n{MODEL_CLASSES}", tmp_path)
    assert "transformers.modeling_utils" in loaded
    assert matching(PRIVATE_SIDE, loaded) == []
    assert tokenizers_of_our_own(loaded, tmp_path) == []


def test_the_tokenizer_rule_sees_a_tokenizer(tmp_path: Path) -> None:
    loaded = loaded_after("from transformers import AutoTokenizer, PreTrainedTokenizerFast", tmp_path)
    assert "transformers.models.auto.tokenization_auto" in matching(TOKENIZER, loaded)
    fast = loaded_after("from transformers import LlamaTokenizerFast", tmp_path)
    assert matching(TOKENIZER, fast)


def test_importing_tidelock_loads_no_heavy_library(tmp_path: Path) -> None:
    assert matching(HEAVY, loaded_after("import tidelock", tmp_path)) == []


def test_help_of_the_command_line_loads_no_heavy_library(tmp_path: Path) -> None:
    code = (
        "import sys\nsys.argv = ['tidelock', '--help']\nfrom tidelock.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    code = stop.code\nelse:\n    code = 0\n"
        "if code not in (0, None):\n    sys.exit(code)"
    )
    assert matching(HEAVY, loaded_after(code, tmp_path)) == []
