"""Twins: one engine by three names. An answer that broke off goes on at once by another of them. An engine that has one
name only is probed first, half a second later."""

from tests.support.kinds import DIALECTS

URL = "{a}"  # of the engine: what CONFIG.format is told


def engines() -> str:
    """Return the lines of stack.yaml for an engine that speaks each dialect, by three names each."""
    return "".join(
        f"  {dialect}{twin}: {{{{dialect: {dialect}, {slots}base_url: '{URL}'}}}}\n"
        for dialect in DIALECTS
        for slots in ["" if dialect == "vllm" else "slots: 256, "]
        for twin in ("", "-2", "-3")
    )


def model(name: str, dialect: str, model: str = "fake-model", *, twins: bool = True) -> str:
    """Return the line of a model of such an engine."""
    names = [dialect, f"{dialect}-2", f"{dialect}-3"][: 3 if twins else 1]
    targets = ", ".join(f"{{{{engine: {it}, model: {model}}}}}" for it in names)
    return f"  {name}: {{{{targets: [{targets}]}}}}\n"


def models() -> str:
    """Return the lines of two models for each dialect: `vllm`, and `vllm-alone`, whose engine has one name."""
    both = ((dialect, twins) for dialect in DIALECTS for twins in (True, False))
    return "".join(model(dialect if twins else f"{dialect}-alone", dialect, twins=twins) for dialect, twins in both)


# Each model at each dialect, with as many failures and retries as a test needs.
CONFIG = (
    f"engines:\n{engines()}models:\n{models()}"
    "default_model: vllm\nbreaker: {{failures: 1000}}\nretries: {{budget: 1}}\n"
)
