"""A server that names what images show: requests that come together are computed together, at one image size.

python examples/server.py --checkpoint runs/digits/best.pt --port 8000
curl --data-binary @photo.jpg 'localhost:8000/classify?topk=3'
curl localhost:8000/metrics
"""

import argparse
import asyncio
import contextlib
import tempfile
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request
from starlette.requests import ClientDisconnect
from torch import Tensor

from tnt_fast.classify import READERS, Classifier, read_class_names
from tnt_fast.images import DataError, open_image
from tnt_fast.optimize import optimize_for_inference

MAX_BYTES = 20 * 2**20  # of an upload


class Full(Exception):
    """More requests wait than the server may hold."""


class Graphs:
    """A model on a CUDA device as one graph for each of the batches 1, 2, 4, …; a batch between two is filled up.

    A graph is launched at once, where a model alone launches kernels one by one.
    """

    def __init__(self, model: Callable[[Tensor], Tensor], image: Tensor, largest: int):
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        pool = None
        sizes = [2**i for i in range((largest - 1).bit_length() + 1)]
        for size in reversed(sizes):  # the largest first: the others share its memory
            batch = image.new_zeros(size, *image.shape)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    model(batch)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                answer = model(batch)
            pool = graph.pool()
            self.graphs[size] = graph, batch, answer

    def __call__(self, images: Tensor) -> Tensor:
        size = 1 << (len(images) - 1).bit_length()
        graph, batch, answer = self.graphs[size]
        batch[: len(images)].copy_(images)
        graph.replay()
        return answer[: len(images)].clone()


class Batcher:
    """Joins images into batches, of all that wait when the batch before is done.

    Args:
        compute: a batch of images → as many rows, in a thread of its own. largest: images a batch.
        wait: seconds that an image waits for others, unless the batch is full before.
    """

    def __init__(self, compute: Callable[[Tensor], Tensor], largest: int, wait: float):
        self.compute, self.largest, self.wait = compute, largest, wait
        self.waiting: deque[tuple[float, Tensor, asyncio.Future]] = deque()
        self.some, self.enough, self.closed = asyncio.Event(), asyncio.Event(), False
        self.sizes: Counter[int] = Counter()
        self.thread = ThreadPoolExecutor(1, "compute")

    async def __call__(self, image: Tensor) -> Tensor:
        answer = asyncio.get_running_loop().create_future()
        self.waiting.append((time.monotonic(), image, answer))
        self._tell()
        return await answer

    def close(self) -> None:
        """End ``run`` when all that waits is answered."""
        self.closed = True
        self._tell()

    def _tell(self) -> None:
        for event, holds in ((self.some, bool(self.waiting)), (self.enough, len(self.waiting) >= self.largest)):
            event.set() if holds or self.closed else event.clear()

    async def run(self) -> None:
        while await self.some.wait() and self.waiting:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.enough.wait(), max(0, self.waiting[0][0] + self.wait - time.monotonic()))
            batch = [self.waiting.popleft() for _ in range(min(self.largest, len(self.waiting)))]
            self._tell()
            images = torch.stack([image for _, image, _ in batch])
            rows: Any
            try:
                rows = await asyncio.get_running_loop().run_in_executor(self.thread, self.compute, images)
            except Exception as error:  # its requests get it; the server lives on
                rows = [error] * len(batch)
            self.sizes[len(batch)] += 1
            for (_, _, answer), row in zip(batch, rows, strict=True):
                if answer.done():
                    continue  # the client has left
                if isinstance(row, Exception):
                    answer.set_exception(row)
                else:
                    answer.set_result(row)


def computation(classifier: Classifier, largest: int) -> Callable[[Tensor], Tensor]:
    """Images of the model's size, on the CPU → logits there: by the copy for inference, on a GPU in CUDA graphs."""
    device = classifier.device
    model: Callable[[Tensor], Tensor] = optimize_for_inference(classifier.model)
    if device.type == "cuda":
        with torch.inference_mode():
            image = torch.zeros(3, *classifier.model.pixel_embed.img_size, device=device)
            model = Graphs(model, image, largest)

    @torch.inference_mode()
    def compute(images: Tensor) -> Tensor:
        return model(images.to(device)).float().cpu()

    compute(torch.zeros(1, 3, *classifier.model.pixel_embed.img_size))  # what the first call prepares is ready then
    return compute


def server(classifier: Classifier, largest: int = 16, wait: float = 0.005, limit: int = 64) -> FastAPI:
    """The application. ``limit``: requests that may be inside; of more each is told when to come again."""
    compute = computation(classifier, largest)
    size = tuple(classifier.model.pixel_embed.img_size)
    seconds: deque[float] = deque(maxlen=1000)  # of the latest requests
    counts: Counter[str] = Counter()
    state: dict[str, Any] = {"inside": 0, "batcher": None}

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        state["batcher"] = batcher = Batcher(compute, largest, wait)
        state["readers"] = ThreadPoolExecutor(READERS, "read")
        running = asyncio.create_task(batcher.run())
        yield
        batcher.close()
        await running
        state["batcher"] = None

    def read(body: bytes) -> Tensor:
        with tempfile.NamedTemporaryFile() as file:
            file.write(body)
            file.flush()
            try:
                return classifier.transform(open_image(file.name))
            except DataError as error:
                raise DataError(str(error).replace(f"the image {file.name!r}", "the image")) from error

    async def answered(request: Request, topk: int) -> dict[str, Any]:
        if state["inside"] >= limit:
            raise Full
        state["inside"] += 1
        try:
            body = bytearray()
            async for piece in request.stream():
                body += piece
                if len(body) > MAX_BYTES:
                    raise HTTPException(413, f"the upload has more than {MAX_BYTES // 2**20} MiB; send a smaller image")
            image = await asyncio.get_running_loop().run_in_executor(state["readers"], read, bytes(body))
            logits = await state["batcher"](image)
        finally:
            state["inside"] -= 1
        if not logits.isfinite().all():
            raise HTTPException(500, "the model's outputs for this image are not finite")
        top = logits.softmax(-1).topk(min(topk, len(classifier.classes)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return {"predictions": [{"class": classifier.classes[i], "index": i, "probability": p} for i, p in pairs]}

    app = FastAPI(title="tnt_fast", lifespan=life)

    @app.post("/classify")
    async def classify(request: Request, topk: Annotated[int, Query(ge=1)] = 5) -> dict[str, Any]:
        """The body is the image file; answers name and probability of the ``topk`` most probable classes."""
        begun = time.perf_counter()
        try:
            answer = await answered(request, topk)
        except Full:
            counts["refused"] += 1
            raise HTTPException(503, f"{limit} requests are waiting; come again", {"Retry-After": "1"}) from None
        except DataError as error:
            counts["bad"] += 1
            raise HTTPException(400, str(error)) from error
        except (HTTPException, ClientDisconnect) as error:
            counts["failed" if getattr(error, "status_code", 0) == 500 else "bad"] += 1
            raise
        except Exception as error:
            counts["failed"] += 1
            raise HTTPException(500, f"{type(error).__name__} while computing") from error
        counts["answered"] += 1
        seconds.append(time.perf_counter() - begun)
        return answer

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "device": str(classifier.device), "image_size": size, "classes": len(classifier.classes)}

    @app.get("/metrics")
    async def metrics() -> dict[str, Any]:
        """Counts since the start; the latency of the latest thousand answers, from the request's head to its answer."""
        latency = {f"p{p}": float(np.percentile(seconds, p)) * 1000 for p in (50, 90, 99)} if seconds else {}
        return {
            "requests": {kind: counts[kind] for kind in ("answered", "bad", "refused", "failed")},
            "inside": state["inside"],
            "latency_ms": latency,
            "batches": {str(size): count for size, count in sorted(state["batcher"].sizes.items())},
        }

    return app


def options() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = command.add_argument
    add("--checkpoint", help="file of 'tnt-fast train', or of timm or the authors with --model")
    add("--model", help="such as tnt_s_patch16_224.in1k, whose hosted weights are taken where there is no checkpoint")
    add("--class-names", metavar="FILE", help="a text file with the names of the classes, one a line")
    add("--device", help="such as cpu, cuda:0; default: a GPU if there is one")
    add("--max-batch", type=int, default=16, help="images computed together")
    add("--max-wait", type=float, default=5, metavar="MS", help="milliseconds that an image waits for others")
    add("--max-requests", type=int, default=64, help="requests inside; more are answered 503 with Retry-After")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=int, default=8000, help="port to listen on")
    return command


def application(args: argparse.Namespace) -> FastAPI:
    """Raises: ValueError, OSError: of the model, as ``tnt-fast classify``, or of a number."""
    if args.max_batch < 1 or args.max_requests < 1 or not 0 <= args.max_wait <= 10_000:
        raise ValueError("--max-batch and --max-requests must be at least 1, --max-wait 0 to 10,000 ms")
    names = read_class_names(args.class_names) if args.class_names else None
    classifier = Classifier(args.checkpoint, args.model, args.device, class_names=names)
    return server(classifier, args.max_batch, args.max_wait / 1000, args.max_requests)


def main(argv: Sequence[str] | None = None) -> int:
    command = options()
    args = command.parse_args(argv)
    try:
        app = application(args)
    except (ValueError, OSError) as error:
        command.exit(2, f"{command.prog}: {type(error).__name__}: {error}\n")
    # Ctrl-C and SIGTERM: no new requests, those inside are answered
    uvicorn.run(app, host=args.host, port=args.port, timeout_graceful_shutdown=30)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
