"""README.md and docs/ stay true: their commands parse, and what they name exists.

`python tests/test_docs.py` corrects the line numbers in links such as [JiT](jit_lab.py#L219).
"""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {path: path.read_text() for path in DOCS}
SYSTEMS = "jit_lab", "unet_ddpm", "serpentine_vae", "dit_t2i"
LINE_LINK = re.compile(r"\[(\w+)\]\((\w+\.py)#L(\d+)\)")


def load(file):
    """The module of a file such as "experiments/emoji.py"."""
    return importlib.import_module(file[:-3].replace("/", "."))


def line_of(name, file):
    """The line of a file on which a function or class is defined, 0 if nowhere."""
    lines = (ROOT / file).read_text().splitlines()
    return next((i for i, line in enumerate(lines, 1) if re.match(rf"(def|class) {name}\b", line)), 0)


def commands():
    """(where, file, words) of each command: in code blocks without a language, between backticks, and in the files'
    docstrings."""
    texts = {f"{name}.py": load(f"{name}.py").__doc__ for name in SYSTEMS}
    for path, text in TEXT.items():
        blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
        found = [block for language, block in blocks if not language] + re.findall(r"`(python [^`\n]+)`", text)
        texts[path.name] = "\n".join(found)
    for where, text in texts.items():
        for line in text.replace("\\\n", " ").splitlines():
            found = re.match(r"\s*(?:python|torchrun .*?) ?((?:experiments/)?\w+\.py)(?: (.*))?$", line)
            if found and "FILE.py" not in line:
                # In a docstring, what a command does follows after two spaces; in a code block, after a #.
                words = found[2] or ""
                if where.endswith(".py"):
                    words = re.split(r"\s{2,}(?=[^\s-])", words)[0]
                yield where, found[1], tuple(shlex.split(words, comments=True))


@pytest.mark.parametrize("file", [f"{name}.py" for name in SYSTEMS] + ["experiments/emoji.py", "experiments/scenes.py"])
def test_each_command_is_accepted_by_its_own_parser(file, monkeypatch, capsys):
    module, given = load(file), []
    table = module.COMMANDS if "/" in file else module.SUBCOMMANDS
    for name, (_, *rest) in table.items():
        monkeypatch.setitem(table, name, (given.append, *rest))
    lines = {(where, words) for where, name, words in commands() if name == file and "--help" not in words}
    for where, words in lines:
        assert module.main(list(words)) == 0, (where, words, capsys.readouterr().err)
    assert len(given) == len(lines) > 0
    assert {words[0] for where, words in lines if where.endswith(".md")} == set(table)  # each is in some document


def test_rows_of_the_benchmark_exist():
    bench = load("experiments/bench.py")
    for _, name, words in commands():
        if name == "experiments/bench.py":
            assert set(bench.parse(words).rows) <= set(bench.ROWS)


def test_links_pictures_and_headings_exist():
    headings = {path: {re.sub(r"[^\w\- ]", "", line).strip().lower().replace(" ", "-")
                       for line in re.findall(r"^#+ (.*)$", text, re.M)} for path, text in TEXT.items()}  # fmt: skip
    for path, text in TEXT.items():
        for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", text):
            if target.startswith("http"):
                continue
            file = (path.parent / target).resolve() if target else path
            assert file.exists(), (path.name, target)
            if anchor and file.suffix == ".md":
                assert anchor in headings[file], (path.name, target, anchor)


def test_links_to_lines_lead_to_what_they_name():
    assert LINE_LINK.search(TEXT[DOCS[0]])
    for text in TEXT.values():
        for name, file, line in LINE_LINK.findall(text):
            assert line_of(name, file) == int(line), f"{name} in {file}; python tests/test_docs.py corrects the numbers"


def test_functions_and_options_that_the_documents_name_exist():
    options = set()
    for name in SYSTEMS:
        for _, config_class, *_ in load(f"{name}.py").SUBCOMMANDS.values():
            options |= {load("common.py").flag_of(field) for field in config_class.__dataclass_fields__.values()}
    torchrun = {"--max-restarts", "--shutdown-timeout", "--nproc-per-node", "--nnodes"}
    for path, text in TEXT.items():
        for name, attributes in re.findall(rf"`({'|'.join(SYSTEMS)}|common)\.(\w+(?:\.\w+)?)\b", text):
            thing = load(f"{name}.py")
            for attribute in attributes.split("."):
                thing = getattr(thing, attribute, None) if attributes != "py" else thing
                assert thing is not None, (path.name, name, attributes)
        for flag in re.findall(r"(?<!\S)`(--[a-z-]+)", text):
            assert flag in options | torchrun | {"--preset", "--help", "--repo"}, (path.name, flag)


def test_each_picture_in_assets_is_in_a_document():
    shown = "".join(TEXT.values())
    assert [p.name for p in (ROOT / "assets").glob("*") if p.suffix != ".json" and p.name not in shown] == []


def test_the_readme_s_python_runs_as_printed(tmp_path, monkeypatch):
    """With small settings in place of the demo's for the run that is trained."""
    common, jit_lab = load("common.py"), load("jit_lab.py")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    (tmp_path / "DIR").mkdir()
    for i in range(8):
        common.paint_face(i)[0].save(f"DIR/{i}.png")
    for name, value in (load("conftest.py").TINY | {"optimizer": "adamw"}).items():
        monkeypatch.setitem(jit_lab.DEMO, name, value)
    names, seen, shown = {}, [], None
    for line in ast.parse(re.search(r"```python\n(.*?)```", TEXT[DOCS[0]], re.S)[1]).body:
        if isinstance(line, ast.Expr):  # a notebook shows the value of the last one
            shown = eval(compile(ast.Expression(line.value), "README.md", "eval"), names)
        else:
            exec(compile(ast.Module([line], []), "README.md", "exec"), names)
        if "rgb" in names and all(names["rgb"] is not rgb for rgb in seen):
            seen.append(names["rgb"])
    assert [rgb.shape[-1] for rgb in seen] == [40, 80, 64, 80, 80, 16]
    for rgb in seen:
        assert rgb.shape == (4, 3, rgb.shape[-1], rgb.shape[-1]) and rgb.min() >= 0 and rgb.max() <= 1
    for rgb in seen[:5]:  # as different from each other as pictures are, within them and between them
        assert rgb.std(dim=(2, 3)).min() > 0.02 and rgb.std(dim=0).mean() > 0.1
    assert isinstance(shown, Image.Image) and shown.size == (32, 32) and shown == common.make_grid(seen[-1])

    model, config = jit_lab.load_model("weights/jit_lab.safetensors", "cpu")
    made = jit_lab.sample(model, config, num=1, steps=20, seed=4, cfg=1, precision="fp32")
    assert torch.allclose(made, seen[4][:1], atol=1e-3)
    x_t = common.flow_point(names["noise"], jit_lab.rgb_to_lab(seen[3]), names["t"])
    nothing = jit_lab.flow_loss(config, 0 * x_t, x_t, jit_lab.rgb_to_lab(seen[3]), names["t"], torch.ones(4, 3, 1, 1))
    assert names["loss"].shape == (4,) and (names["loss"] < nothing / 5).all()


if __name__ == "__main__":
    for path, text in TEXT.items():
        path.write_text(LINE_LINK.sub(lambda m: f"[{m[1]}]({m[2]}#L{line_of(m[1], m[2])})", text))
