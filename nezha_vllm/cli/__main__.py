"""`python -m nezha_vllm.cli`: the ``nezha`` command for launchers such as torchrun."""

import sys

from nezha_vllm.cli import main

sys.exit(main())
