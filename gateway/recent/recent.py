"""Recent: what one worker tells of the requests that it serves, and what any worker can say of those of all."""

from gateway.exchange import Ending, Exchange
from gateway.recent.captures import Captures
from gateway.recent.courses import Course, Courses
from gateway.recent.pace import Pace


class Memory:
    """Hold the memory of all workers. The master makes it before it forks."""

    def __init__(self) -> None:
        self.pace = Pace()
        self.courses = Courses()
        self.captures = Captures()


class Recent:
    """Write to that memory as the worker that has this seat. The other attributes are for whoever reads."""

    def __init__(self, memory: Memory, seat: int) -> None:
        self.pace = memory.pace
        self.courses = memory.courses
        self.captures = memory.captures
        self._seat = seat

    def begins(self, exchange: Exchange) -> Course:
        """Note that a request begins, and return its Course. `ended` must follow."""
        return Course(exchange)

    def ended(self, course: Course, ending: Ending, *, keep: bool) -> None:
        """Note that a request has ended. With `keep`, its course is kept. Rejected requests are not kept, because they
        may come in thousands and would displace all others."""
        self.pace.ended(self._seat, ending)
        if keep:
            self.courses.keep(course.told(ending))
