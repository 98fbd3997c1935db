"""Count the lines of code outside tests by folder, without blank lines, comments and docstrings.

python -m benchmarks.code_lines
"""

import ast
import io
import subprocess
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(source: str) -> int:
    """Return how many lines of a program hold code."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    code = {line for token in tokens if token.type not in NO_CODE for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            code -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(code)


def main() -> None:
    """Print the lines of each folder and their sum."""
    names = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines: Counter[str] = Counter()
    for path in map(Path, names.split()):
        if path.parts[0] != "tests":
            lines[str(path.parent)] += code_lines((ROOT / path).read_text(encoding="utf-8"))
    for folder, count in sorted(lines.items()):
        print(f"{count:6,} {folder}")
    print(f"{lines.total():6,} in all")


if __name__ == "__main__":
    main()
