"""Machine: programs that describe a machine to the scripts. It has enough of everything until a test changes it."""

import shutil
from pathlib import Path

from tests.support.clone import write_program

GB = 10**9


class Machine:
    """Programs that describe a machine with enough of everything until a test changes it. Docker is the real one."""

    def __init__(self, programs: Path, image: str) -> None:
        self.programs = programs
        self.environment = {
            "OLLAMA_IMAGE": image,
            "VLLM_IMAGE": image,
            "PATH": str(programs),
            "STACK_PUBLISH": "127.0.0.1:0",
        }
        self.docker()
        self.disk(free=500 * GB)
        self.gpus(81920)

    def lacks(self, *images: str) -> None:
        """Have Docker say that it has no image whose name is like one of these patterns."""
        program = self.programs / "docker"
        patterns = " | ".join(f'"image inspect "{it}' for it in images)
        write_program(program, f'case "$*" in {patterns}) exit 1 ;; esac\n' + program.read_text())

    def docker(self, *, memory: int = 64 * GB, runtimes: str = '{"nvidia":{}}', version: str = "28.0.1") -> None:
        real = shutil.which("docker")
        write_program(
            self.programs / "docker",
            f"""case "$*" in
            "info --format {{{{.MemTotal}}}}") echo {memory} ;;
            "info --format {{{{.DockerRootDir}}}}") echo / ;;
            "info --format {{{{json .}}}}") echo '{{"Runtimes":{runtimes}}}' ;;
            "version --format {{{{.Server.Version}}}}") echo {version} ;;
            *) exec {real} "$@" ;;
            esac
            """,
        )

    def disk(self, *, free: int) -> None:
        write_program(self.programs / "df", f"echo heading; echo /dev/disk 1000000000 0 {free // 1024} 1% /\n")

    def gpus(self, *mebibytes: int) -> None:
        write_program(self.programs / "nvidia-smi", "".join(f"echo {size}\n" for size in mebibytes))
