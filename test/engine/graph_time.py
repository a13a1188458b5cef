"""Times of calls in CUDA graphs, for the scripts that check kernels on a GPU."""

import statistics

import torch

WARM_UPS = 3


def captured(calls):
    """A CUDA graph of calls, and their results, which every replay writes anew."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = [call() for call in calls]
    return graph, results


def replays_ms(graph, n):
    """Milliseconds of `n` replays."""
    times = []
    for _ in range(n + WARM_UPS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times[WARM_UPS:]


def graph_us(calls, replays=20):
    """Median microseconds of one of the calls, which are replayed as one graph."""
    graph, _results = captured(calls)
    return statistics.median(replays_ms(graph, replays)) * 1e3 / len(calls)
