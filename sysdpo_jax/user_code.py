"""Calls of code that users give: tools, scorers, readers, factories, and the modules that hold them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


@contextmanager
def user_code(what: str, failure: type[Exception], expected: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Around a call of the user's code: whatever it raises, `sys.exit` included, is a failure of that code.

    Only Ctrl-C, and so SIGTERM, goes through as it is: a stop is the command's business.

    Args:
        what: Names the code and its place, for example "node 'price': the tool shop:price".
        failure: Class of what is raised instead; it takes a message.
        expected: Classes that the code is meant to raise, which go through as they are.

    Raises:
        failure: Names `what`, the class and the words of the exception, which is its cause and whose traceback is
            logged.
    """
    try:
        yield
    except expected:
        raise
    except (Exception, SystemExit) as error:
        logger.error("%s failed", what, exc_info=error)
        said = f"sys.exit({error.code!r})" if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
        raise failure(f"{what} failed ({said}): fix it") from error
