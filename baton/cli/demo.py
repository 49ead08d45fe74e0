"""The demo: start a disaggregated cluster, send it one real request, then stay up.

``scripts/demo`` calls this after it has installed what is needed. ``--once`` exits after the
request: 0 if its tokens came, else non-zero with the reason.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.live import Live
from rich.text import Text

from baton.cli.admin import instance_table, make_console
from baton.cli.cluster import Endpoints
from baton.cli.common import with_clear_errors
from baton.cli.serve import Stopper, run_cluster
from baton.cli.settings import load_settings
from baton.client import BatonClient, generate_request
from baton.client.admin import AdminClient
from baton.core.config import ServeConfig
from baton.core.errors import BatonError, Unavailable
from baton.core.slo import Timing
from protos.baton.v1 import cluster_pb2

DEMO_MODEL = Path(__file__).resolve().parents[2] / "deploy" / "demo-model"
PROMPT = 'def read_config(path):\n    """Read a configuration file and return a dictionary."""\n'
NUM_TOKENS = 96
_STATUS_EVERY_S = 2.0

console = make_console()


def demo(
    once: Annotated[bool, typer.Option(help="exit after one request")] = False,
    model: Annotated[Path | None, typer.Option(help="folder of the checkpoint")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with settings")] = None,
    http_port: Annotated[int | None, typer.Option(help="0: any")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="0: any")] = None,
    prefill: Annotated[int | None, typer.Option()] = None,
    decode: Annotated[int | None, typer.Option()] = None,
    mixed: Annotated[int | None, typer.Option()] = None,
    cluster: Annotated[str | None, typer.Option()] = None,
) -> None:
    """Run the demo cluster."""
    flags = {
        "model": None if model is None else str(model),
        "http_port": http_port,
        "grpc_port": grpc_port,
        "prefill": prefill,
        "decode": decode,
        "mixed": mixed,
        "cluster": cluster,
    }
    started = time.monotonic()

    def run() -> None:
        settings = load_settings(config, flags, defaults={"model": str(DEMO_MODEL)})

        def while_up(endpoints: Endpoints, stopper: Stopper) -> None:
            with stopper.waiting():
                send_request(endpoints)
            console.print(f"[dim]from start to here: {time.monotonic() - started:.1f} s[/dim]")
            if not once:
                print_how_to_talk(endpoints, settings)
                show_status(endpoints, stopper)

        run_cluster(settings, console=console, while_up=while_up)

    with_clear_errors(run)


def send_request(endpoints: Endpoints) -> None:
    """Stream one completion and say who served it and how fast. Raises BatonError."""
    console.rule("a request")
    console.print(PROMPT, end="", style="cyan", markup=False, highlight=False)
    arrival = time.monotonic()
    times: list[float] = []
    request_id = ""
    finish_reason = ""
    num_tokens = 0
    request = generate_request(
        PROMPT, temperature=0.7, seed=7, max_tokens=NUM_TOKENS, ignore_eos=True
    )
    with BatonClient(endpoints.grpc) as client:
        for message in client.generate(request, timeout_s=60.0):
            times.append(time.monotonic())
            request_id = message.request_id
            num_tokens += len(message.token_ids)
            finish_reason = message.finish_reason or finish_reason
            console.print(message.text, end="", markup=False, highlight=False)
    console.print()
    if num_tokens != NUM_TOKENS or finish_reason != "length":
        raise Unavailable(
            f"the demo request got {num_tokens} of {NUM_TOKENS} tokens (ended by {finish_reason!r})"
        )
    timing = Timing(arrival, times[0], times[-1], num_tokens)
    console.rule()
    with AdminClient(endpoints.controller) as admin:
        served = explain_when_known(admin, request_id)
        cluster = admin.status()
    console.print(instance_table(cluster))
    tpot_s = timing.tpot_s or 0.0
    console.print(
        f"request [bold]{request_id}[/bold]: {served}\n"
        f"TTFT [bold]{timing.ttft_s * 1000:.1f} ms[/bold]  TPOT [bold]{tpot_s * 1000:.2f} ms[/bold]"
        f"  {num_tokens} tokens in {timing.e2e_s:.2f} s"
    )


def explain_when_known(admin: AdminClient, request_id: str) -> str:
    """Who served a request, in words."""
    attempt = admin.explain(request_id).attempts[-1]
    if attempt.prefill_instance == attempt.decode_instance:
        return f"prefill and decode on {attempt.prefill_instance}"
    return f"prefill on {attempt.prefill_instance}, decode on {attempt.decode_instance}"


def print_how_to_talk(endpoints: Endpoints, settings: ServeConfig) -> None:
    """Three ways to send a request, and the operator's command."""
    model = settings.served_model_name or Path(settings.model).resolve().name
    command = os.path.relpath(Path(sys.executable).with_name("baton"))
    which = "" if settings.cluster == "default" else f" --cluster {settings.cluster}"
    text = f"""
[bold]curl[/bold]
  curl -N http://{endpoints.http}/v1/completions -H 'content-type: application/json' \\
    -d '{{"model": "{model}", "prompt": "import os\\n", "max_tokens": 64, "stream": true}}'

[bold]openai[/bold]
  from openai import OpenAI
  client = OpenAI(base_url="http://{endpoints.http}/v1", api_key="none")
  client.chat.completions.create(
      model="{model}", messages=[{{"role": "user", "content": "Write a function."}}])

[bold]gRPC[/bold] (protos/baton/v1/inference.proto, reflection is on)
  grpcurl -plaintext -d '{{"text": "class Queue:", "sampling": {{"max_tokens": 32}}}}' \\
    {endpoints.grpc} baton.v1.Inference/Generate

[bold]baton[/bold]
  {command} status{which}       (also: role INSTANCE ROLE, drain INSTANCE, explain REQUEST_ID)

Ctrl-C stops the cluster.
"""
    console.print(text, highlight=False, soft_wrap=True)  # lines to copy stay whole


def show_status(endpoints: Endpoints, stopper: Stopper) -> None:
    """One live line until a signal; without a terminal only the wait."""
    if not console.is_terminal:
        stopper.event.wait()
        return
    with (
        AdminClient(endpoints.controller) as admin,
        Live(console=console, auto_refresh=False) as live,
    ):
        while not stopper.event.wait(_STATUS_EVERY_S):
            try:
                reply = admin.status()
            except BatonError as error:
                live.update(Text(f"controller: {error.message}"), refresh=True)
                continue
            parts = [
                f"{_name(item)} run {item.num_running} wait {item.num_waiting}"
                for item in reply.instances
                if item.state != "dead"
            ]
            line = f"{time.strftime('%H:%M:%S')} requests {reply.num_placements} | "
            text = Text(line + " | ".join(parts), no_wrap=True, overflow="ellipsis")
            live.update(text, refresh=True)


def _name(item: cluster_pb2.InstanceStatus) -> str:
    """The id, and what it does not say: another role, a state other than ready."""
    role = "" if item.instance_id.startswith(item.role) else f" ({item.role})"
    return item.instance_id + role + ("" if item.state == "ready" else f" {item.state}")


if __name__ == "__main__":
    typer.run(demo)
