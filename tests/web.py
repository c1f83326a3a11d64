"""A local web server that stands for where models are published, with the faults of real ones."""

import contextlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Web:
    """What the server gives, by path; `faults` are `cut`, `hang`, or a status such as 404; `asked` are the paths asked for."""

    def __init__(self):
        self.files, self.faults, self.asked = {}, {}, []


@contextlib.contextmanager
def serving(handler):
    """Serves with a handler's class; gives the address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@contextlib.contextmanager
def web():
    """A `Web`, and its address."""
    state, released = Web(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0]
            state.asked.append(path)
            fault = state.faults.get(path, 200 if path in state.files else 404)
            if isinstance(fault, int) and fault != 200:
                return self.send_error(fault)
            content = state.files[path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content if fault == 200 else content[: len(content) // 2])
            self.wfile.flush()
            if fault == "hang":
                released.wait(30)
            return None

        def log_message(self, *args):
            """Quiet."""

    with serving(Handler) as address:
        yield state, address
        released.set()
