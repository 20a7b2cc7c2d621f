"""README.md and docs/: their code runs, their commands are right, their links lead somewhere.

A comment in the line before a block says what is special about it:

    <!-- not run: why -->   needs a GPU, a download or another model: compiled only (Python)
    <!-- run -->            a shell block that is run, with the shipped model
    <!-- output -->         what the Python block before prints, exactly
"""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from itertools import dropwhile
from pathlib import Path
from typing import NamedTuple

import pytest
from engine_checks import OUTPUT, REPO, script_environment
from forked_python import ForkedPython
from safetensors.torch import load_file, save_file
from tiny_models import edit_config

import nanovllm

SHIPPED = Path(nanovllm.__file__).parent / "assets" / "austen-7m"
DOCUMENTS = sorted([*REPO.glob("*.md"), *(REPO / "docs").glob("*.md")])
BLOCK = re.compile(r"(?:^<!-- ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SETTING = re.compile(r"\w+=")  # of a command's environment
HEREDOC = re.compile(r"<<'(\w+)'.*?^\1$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    mark: str  # the comment before it, or ""
    language: str
    code: str
    line: int  # of its fence


def name_of(document: Path) -> str:
    return str(document.relative_to(REPO))


@cache
def blocks_of(document: Path) -> list[Block]:
    text = document.read_text("utf-8")
    return [
        Block(match[1] or "", match[2], match[3], text.count("\n", 0, match.start(2)) + 1)
        for match in BLOCK.finditer(text)
    ]


def documents_with(language: str) -> list[Path]:
    return [path for path in DOCUMENTS if any(b.language == language for b in blocks_of(path))]


def test_every_block_says_its_language_and_every_mark_is_known():
    for document in DOCUMENTS:
        blocks = blocks_of(document)
        assert document.read_text("utf-8").count("\n```") == 2 * len(blocks), name_of(document)
        for block in blocks:
            where = f"{name_of(document)}:{block.line}"
            assert block.language in ("python", "bash", "text"), where
            assert re.fullmatch(r"|run|output|not run: .+", block.mark), where


# ---- Python -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory) -> Path:
    """The shipped model without seven of its eight layers."""
    folder = tmp_path_factory.mktemp("models") / "one-layer"
    shutil.copytree(SHIPPED, folder)
    edit_config(folder, num_hidden_layers=1, layer_types=["full_attention"])
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not re.search(r"s\.[1-7]\.", name)}
    save_file(kept, folder / "model.safetensors")
    return folder


def at_home(code: str, model: Path) -> str:
    """The code with this model in place of every other."""
    calls = r'((?:LLM|EngineArgs)\(\s*)"[^"]*"'
    return re.sub(calls, lambda match: f"{match[1]}{str(model)!r}", code)


@pytest.mark.skipif(not SHIPPED.is_dir(), reason="the shipped model is not in this checkout")
@pytest.mark.parametrize("document", documents_with("python"), ids=name_of)
def test_the_python_of_a_document_runs_from_top_to_bottom(
    document, tmp_path, monkeypatch, capsys, one_layer
):
    """What has an output has it with the shipped model."""
    monkeypatch.chdir(tmp_path)
    is_exact = document.name == "README.md" or any(b.mark == "output" for b in blocks_of(document))
    namespace = {"__name__": "__main__"}
    printed = ""
    for block in blocks_of(document):
        if block.mark == "output":
            assert printed == block.code, f"{name_of(document)}:{block.line}"
        if block.language != "python":
            continue
        # An error names the document's own line.
        source = "\n" * block.line + at_home(block.code, SHIPPED if is_exact else one_layer)
        code = compile(source, name_of(document), "exec")
        capsys.readouterr()
        if not block.mark:
            exec(code, namespace)
        printed = capsys.readouterr().out


# ---- commands ---------------------------------------------------------------------------------


def commands_of(block: Block) -> list[list[str]]:
    """The words of each of a block's commands, without comments and what is fed to them."""
    text = HEREDOC.sub("", block.code).replace("\\\n", " ")
    commands = []
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = min((words.index(word) for word in ("&&", ";") if word in words), default=None)
            commands.append([*dropwhile(SETTING.match, words[:end])])
            words = words[end + 1 :] if end is not None else []
    return commands


@cache
def help_of(*program: str) -> str:
    command = [sys.executable, *program, "--help"]
    with ForkedPython(command, cwd=REPO, env=script_environment(), **OUTPUT) as process:
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def check_command(words: list[str]) -> None:
    """Its program's help knows its options, and the repository's files in it are there."""
    if words[0] == "python":
        program = words[1:3] if words[1] == "-m" else words[1:2]
        rest = words[1 + len(program) :]
        options = {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
        if options:
            assert options <= set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", help_of(*program))), words
    for word in words:
        path = word.partition("::")[0]
        if path.startswith(("tests/", "docs/", "nanovllm/", ".ci/")):
            assert (REPO / path).exists(), word
    if words[:2] == ["pip", "install"]:
        extras = re.findall(r"\[(.+?)\]", " ".join(words))
        declared = (REPO / "pyproject.toml").read_text("utf-8")
        for extra in extras:
            assert re.search(rf"^{re.escape(extra)} = \[", declared, re.MULTILINE), words


@pytest.mark.parametrize("document", documents_with("bash"), ids=name_of)
def test_the_commands_of_a_document_are_right(document, tmp_path):
    for block in blocks_of(document):
        if block.language != "bash":
            continue
        subprocess.run(["bash", "-n"], input=block.code, text=True, check=True)
        for words in commands_of(block):
            check_command(words)
        if block.mark == "run":
            code = block.code.replace("nanovllm/assets/austen-7m", str(SHIPPED))
            code = re.sub(r"^python ", f"{shlex.quote(sys.executable)} ", code, flags=re.MULTILINE)
            subprocess.run(
                ["bash", "-e"],
                input=code,
                cwd=tmp_path,
                env=script_environment(),
                text=True,
                check=True,
                timeout=300,
            )


# ---- what the documents say ---------------------------------------------------------------------


def test_the_python_of_comments_that_say_not_run_is_still_python():
    skipped = [b for d in DOCUMENTS for b in blocks_of(d) if b.mark.startswith("not run")]
    assert skipped
    for block in skipped:
        if block.language == "python":
            assert ast.parse(block.code).body


def anchors_of(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    text = BLOCK.sub("", document.read_text("utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_the_links_of_a_document_lead_somewhere(document):
    text = BLOCK.sub("", document.read_text("utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def test_the_readme_is_short():
    assert len((REPO / "README.md").read_text("utf-8").splitlines()) <= 220


def test_the_picture_of_the_benchmark_is_that_of_its_table():
    import throughput_plot

    panels = throughput_plot.read_table((REPO / "README.md").read_text("utf-8"))
    assert throughput_plot.draw(panels) == throughput_plot.PICTURE.read_text("utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_the_files_that_a_document_names_are_there(document):
    if document.name == "CHANGELOG.md":
        return  # of what has been, too
    text = BLOCK.sub("", document.read_text("utf-8"))
    missing = {
        path
        for path in re.findall(r"`([\w.]+/[\w./-]*)`", text)
        if not any((root / path).exists() for root in (REPO, REPO / "nanovllm"))
    }
    assert not missing
