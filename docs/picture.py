"""A picture of what a command prints on a terminal: python docs/picture.py FILE.svg COLUMNS COMMAND...

docs/data_report.svg   88 mft data report experiment=demo
docs/data_show.svg     88 mft data show experiment=demo task=function_name --n 1
"""

import io
import os
import subprocess
import sys

from rich.console import Console
from rich.text import Text

file, columns, *command = sys.argv[1:]
terminal = os.environ | {"FORCE_COLOR": "1", "COLUMNS": columns, "TERM": "xterm-256color"}
printed = subprocess.run(command, env=terminal, check=True, stdout=subprocess.PIPE, text=True).stdout
console = Console(record=True, width=int(columns), file=io.StringIO())
console.print(f"$ {' '.join(command)}", style="bold", highlight=False)
console.print(Text.from_ansi(printed))
console.save_svg(file, title=" ".join(command[:3]))
