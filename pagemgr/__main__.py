"""``python -m pagemgr`` is ``pagemgr``."""

from .cli.main import main

main(prog_name="pagemgr")
