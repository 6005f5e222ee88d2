"""``python -m finelip_fast.cli``."""

from finelip_fast.cli import main

raise SystemExit(main())
