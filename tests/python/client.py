"""A gRPC client of podflame.v1 that shares no code with podflame.

Its stubs are generated from proto/ when it runs; it needs the packages grpcio and grpcio-tools.

    client.py SOCKET profiles N           reads N batches (0: to the end), prints a summary as JSON
    client.py SOCKET events N             the same for events
    client.py SOCKET flamegraph SIGNAL FORMAT FILE
                                          writes a flame graph, prints what it shows as JSON
    client.py SOCKET status               prints the state of the agent as JSON

Exits with 1, and the reason on standard error, when an answer breaks what proto/ promises.
"""

import collections
import importlib
import json
import pathlib
import sys
import tempfile

import grpc
import grpc_tools
from grpc_tools import protoc

PROTO = pathlib.Path(__file__).resolve().parents[2] / "proto"
TIMEOUT_S = 120

# For a unix socket grpcio sends the path as the authority, percent-encoded, which is no authority
# of RFC 3986: servers built on hyper refuse it (grpc/grpc#38142, hyperium/h2#487).
OPTIONS = [("grpc.default_authority", "localhost")]


def generate(directory):
    """Generates the stubs and imports them: (messages, service)."""
    well_known = pathlib.Path(grpc_tools.__file__).parent / "_proto"
    files = sorted(str(p.relative_to(PROTO)) for p in PROTO.glob("podflame/v1/*.proto"))
    arguments = [
        "protoc",
        f"-I{PROTO}",
        f"-I{well_known}",
        f"--python_out={directory}",
        f"--grpc_python_out={directory}",
        *files,
    ]
    if protoc.main(arguments) != 0:
        sys.exit("protoc failed")
    sys.path.insert(0, directory)
    name = "podflame.v1.profiler_pb2"
    return importlib.import_module(name), importlib.import_module(name + "_grpc")


class Dictionary:
    """The tables of one generation, by ID."""

    TABLES = ("strings", "mappings", "functions", "frames", "stacks", "workloads")

    def __init__(self):
        self.generation = None
        self.tables = {}

    def apply(self, message):
        if message.generation != self.generation:
            self.generation = message.generation
            self.tables = {name: [] for name in self.TABLES}
        for name in self.TABLES:
            self.tables[name].extend(getattr(message, name))

    def names(self, stack_id):
        """Function names of a stack, innermost first. An ID that was not sent raises IndexError."""
        t = self.tables
        frames = [t["frames"][f] for f in t["stacks"][stack_id].frame_ids]
        return [t["strings"][t["functions"][f.function_id].name_id] for f in frames]

    def workload(self, workload_id):
        return self.tables["workloads"][workload_id]


def summarize(messages, items, wanted):
    """Reads a stream and sums it up."""
    dictionary = Dictionary()
    counts, weights = collections.Counter(), collections.Counter()
    stacks, workloads, losses = collections.Counter(), collections.Counter(), collections.Counter()
    header, end, sequences, batches_lost = None, None, [], 0
    for message in messages:
        kind = message.WhichOneof("message")
        if kind == "header":
            if header is not None or sequences:
                sys.exit("a header that is not first")
            header = message.header
        elif kind == "dictionary":
            dictionary.apply(message.dictionary)
        elif kind == "end":
            end = message.end
        elif kind == "batch":
            batch = message.batch
            if not sequences or sequences[-1] != batch.sequence:
                sequences.append(batch.sequence)
            batches_lost += batch.batches_lost
            for loss in batch.losses:
                losses[f"{loss.stage}/{loss.probe or loss.signal}/{loss.reason}"] += loss.events
            entries = getattr(batch, items)
            if entries and batch.generation != dictionary.generation:
                sys.exit(f"batch {batch.sequence} is of a generation that was not sent")
            for entry in entries:
                signal = entry.signal if items == "samples" else entry.WhichOneof("detail")
                count = entry.count if items == "samples" else 1
                counts[str(signal)] += count
                weights[str(signal)] += entry.weight if items == "samples" else 0
                stacks[";".join(reversed(dictionary.names(entry.stack_id)))] += count
                workloads[dictionary.workload(entry.workload_id).name] += count
            if wanted and len(sequences) >= wanted and not batch.continues:
                break
    return {
        "epoch": header.agent_epoch if header else None,
        "batches": len(sequences),
        "first": sequences[0] if sequences else None,
        "last": sequences[-1] if sequences else None,
        "batches_lost": batches_lost,
        "counts": counts,
        "weights": weights,
        "stacks": stacks,
        "workloads": workloads,
        "losses": losses,
        "end": end and {
            "reason": end.reason,
            "deliveries": {
                str(d.signal): [d.aggregated, d.delivered, d.lost] for d in end.deliveries
            },
            "aggregated": {p.probe: p.aggregated for p in end.probes},
        },
    }


def flame_graph(pb2, stub, signal, form, path):
    """Writes a flame graph and returns what it shows."""
    request = pb2.GetFlameGraphRequest(
        signal="SIGNAL_" + signal.upper().replace("-", "_"),
        format="FLAME_GRAPH_FORMAT_" + form.upper(),
    )
    info, data = None, b""
    for message in stub.GetFlameGraph(request, timeout=TIMEOUT_S):
        if message.HasField("info"):
            if info is not None:
                sys.exit("info twice")
            info = message.info
        data += message.data
    if info is None or len(data) != info.size_bytes:
        sys.exit("the flame graph is not as long as its info says")
    pathlib.Path(path).write_bytes(data)
    return {"count": info.count, "weight": info.weight, "lost": info.lost, "bytes": len(data)}


def main(socket, mode, *rest):
    with tempfile.TemporaryDirectory() as directory:
        pb2, service = generate(directory)
        with grpc.insecure_channel(f"unix:{socket}", OPTIONS) as channel:
            stub = service.ProfilerStub(channel)
            if mode == "profiles":
                stream = stub.StreamProfiles(pb2.StreamProfilesRequest())
                answer = summarize(stream, "samples", int(rest[0]))
            elif mode == "events":
                stream = stub.StreamEvents(pb2.StreamEventsRequest())
                answer = summarize(stream, "events", int(rest[0]))
            elif mode == "flamegraph":
                answer = flame_graph(pb2, stub, *rest)
            elif mode == "status":
                from google.protobuf import json_format

                status = stub.GetStatus(pb2.GetStatusRequest(), timeout=TIMEOUT_S)
                answer = json_format.MessageToDict(status, preserving_proto_field_name=True)
            else:
                sys.exit(__doc__)
    print(json.dumps(answer))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
