"""Run the service: `python -m gateway`."""

import gc

gc.disable()  # what is imported stays, and to look for garbage meanwhile takes an eighth of the start

from gateway.server.master import main  # noqa: E402

gc.freeze()  # for each worker, too
gc.enable()
main()
