"""Run the service: `python -m gateway`. With --check, only check its settings."""

import argparse
import gc
import sys

gc.disable()  # what is imported stays, and to look for garbage meanwhile takes an eighth of the start

parser = argparse.ArgumentParser(
    prog="python -m gateway", description="Run the gateway. .env.example lists its settings, all environment variables."
)
parser.add_argument("--check", action="store_true", help="only check the settings, stack.yaml and models.yaml")
if parser.parse_args().check:
    from gateway import config, settings  # a fifth of the imports below

    try:
        config.load(settings.load())
    except settings.SettingsError as exc:
        sys.exit(str(exc))
    sys.exit()

from gateway.server.master import main  # noqa: E402

gc.freeze()  # for each worker, too
gc.enable()
main()
