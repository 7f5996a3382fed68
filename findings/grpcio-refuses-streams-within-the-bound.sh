#!/usr/bin/env bash
# A gRPC channel that knows how many calls a server takes at once keeps to it, and most of its calls are refused all the
# same.
#
# Versions: grpcio 1.85.3 (1.81.1 does the same).
# Behaviour: a server with `grpc.max_concurrent_streams` tells a channel so in HTTP/2's SETTINGS, and the channel holds
# further calls back until one ends. The next one begins as soon as an answer has come, while the server still counts the
# call that it answered: it is sent back (RST_STREAM, REFUSED_STREAM), the program sees UNAVAILABLE, and so on for those
# that wait. gRPC asks again once by itself. A retry policy of a few attempts helps where answers take little time.
# What to do: hold calls back in the program, well below the bound, or try again for as long as a call may take.
# Output seen: "1.85.3: 10 at once at most; of 100 calls 75 failed: Stream removed (RST_STREAM (Received RST_STREAM with
# error code 7))"
# Exit code: 0 while this is so; not 0 once the calls that wait are served.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet grpcio==1.85.3
cat > "$work/try.py" <<'PY'
import asyncio
import sys

import grpc

LIMIT, CALLS = 10, 100


class Answers(grpc.GenericRpcHandler):
    most = now = 0

    def service(self, _):
        return grpc.unary_unary_rpc_method_handler(self.answer)

    async def answer(self, request, context):
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.2)
        self.now -= 1
        return b""


async def main():
    server, answers = grpc.aio.server(options=[("grpc.max_concurrent_streams", LIMIT)]), Answers()
    server.add_generic_rpc_handlers((answers,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/a/b")
        await call(b"")  # from here on the channel knows the bound
        done = await asyncio.gather(*(call(b"") for _ in range(CALLS)), return_exceptions=True)
    await server.stop(0)
    failed = [error for error in done if isinstance(error, grpc.aio.AioRpcError)]
    told = failed[0].details() if failed else ""
    print(f"{grpc.__version__}: {answers.most} at once at most; of {CALLS} calls {len(failed)} failed: {told}")
    refused = [e for e in failed if e.code() is grpc.StatusCode.UNAVAILABLE and "error code 7" in e.details()]
    sys.exit(0 if answers.most <= LIMIT and len(refused) == len(failed) > CALLS / 10 else 1)


asyncio.run(main())
PY
"$work/venv/bin/python" "$work/try.py" 2>/dev/null
