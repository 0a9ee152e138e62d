"""What a file of records holds, in one pass: lengths, sources, diversity, scores, and what ranking can learn from.

Kept in memory are the distinct lengths with their counts, 8 bytes a score, and the responses of at most
``SELF_BLEU_QUERIES`` queries; nothing else grows with the file.
"""

from __future__ import annotations

import hashlib
import heapq
import html
import io
import itertools
import math
import re
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rrhf.records.record import Record, query_text
from rrhf.records.sources import source_names

SELF_BLEU_QUERIES = 200  # those whose ids have the smallest hashes: the same whatever the order of the file
SELF_BLEU_RESPONSES = 16  # of one source to one query
NO_SIGNAL_SHARE = 0.2  # more than this share of queries without a ranking signal is worth a warning
BINS = 30


# --- one pass ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Source:
    """What one source, or all of them, has given so far."""

    responses: int = 0
    queries: int = 0
    cut: int = 0
    wins: float = 0.0
    scores: array[float] = field(default_factory=lambda: array("d"))
    maxima: array[float] = field(default_factory=lambda: array("d"))
    deviations: array[float] = field(default_factory=lambda: array("d"))
    distinct: list[float] = field(default_factory=lambda: [0.0, 0.0])
    distinct_queries: list[int] = field(default_factory=lambda: [0, 0])


# A query kept for self-BLEU: its id's hash, negated, its place in the file, and the words of each source's responses;
# the group None is all the query's responses together.
_Sampled = tuple[int, int, list[tuple[str | None, list[list[str]]]]]


@dataclass(slots=True)
class _Moments:
    """Running sums of pairs, centred as they grow (Welford), for a correlation in one pass."""

    n: int = 0
    mean: list[float] = field(default_factory=lambda: [0.0, 0.0])
    squares: list[float] = field(default_factory=lambda: [0.0, 0.0])
    product: float = 0.0

    def add(self, first: float, second: float) -> None:
        self.n += 1
        before = first - self.mean[0], second - self.mean[1]
        self.mean[0] += before[0] / self.n
        self.mean[1] += before[1] / self.n
        self.squares[0] += before[0] * (first - self.mean[0])
        self.squares[1] += before[1] * (second - self.mean[1])
        self.product += before[0] * (second - self.mean[1])

    def correlation(self) -> float | None:
        """Return Pearson's r, None where one side does not vary."""
        scale = math.sqrt(self.squares[0]) * math.sqrt(self.squares[1])
        return self.product / scale if scale > 0 else None


def inspect_records(records: Iterable[Record]) -> dict[str, Any]:
    """Measure records in one pass; the result is plain JSON.

    Scores: ``mean`` and ``std`` (of the population) over all scored responses and ``mean_of_maxima`` over the queries'
    best, as in the paper's Table 6; ``std_within_query`` is the mean of the queries' own deviations. A query's win is
    shared by the responses that tie for it; a source's ``win_share`` is out of all queries with a score, and
    ``response_share`` is what chance would give it. ``tied_pairs`` are pairs of one query's responses with equal
    scores. A query whose scores have fewer than two distinct values carries no ranking signal. A response that several
    sources gave and merging made one counts for each of them, so shares by source can then sum to more than 1.

    Diversity, by source: ``distinct_1`` and ``distinct_2`` are the distinct share of the words and word pairs in the
    source's responses to one query, averaged over queries; ``self_bleu`` is the mean BLEU-4 (zero counts as 0.1) of
    each response against the others of its source to the same query, over at most ``SELF_BLEU_QUERIES`` queries and
    ``SELF_BLEU_RESPONSES`` responses each. Words are split at white space.
    """
    n = unscored_records = duplicates = duplicate_queries = no_signal = scored_queries = 0
    unscored = pairs = tied = empty = 0
    ks: Counter[int] = Counter()
    finish: Counter[str] = Counter()
    lengths = {name: Counter[int]() for name in ("query_words", "query_characters", "words", "characters")}
    sources: dict[str, _Source] = {}
    overall = _Source()
    across, within = _Moments(), _Moments()
    sample: list[_Sampled] = []

    for record in records:
        n += 1
        k = len(record.responses)
        ks[k] += 1
        text = query_text(record.query)
        lengths["query_words"][len(text.split())] += 1
        lengths["query_characters"][len(text)] += 1
        finish.update(record.finish)
        repeated = k - len(set(record.responses))
        duplicates += repeated
        duplicate_queries += repeated > 0
        empty += sum(not response.strip() for response in record.responses)
        words = [response.split() for response in record.responses]
        for response, split in zip(record.responses, words, strict=True):
            lengths["words"][len(split)] += 1
            lengths["characters"][len(response)] += 1

        groups: dict[str, list[int]] = {}
        for index, tag in enumerate(record.sources):
            for name in source_names(tag):
                groups.setdefault(name, []).append(index)
        for name, members in groups.items():
            _add_texts(sources.setdefault(name, _Source()), record, words, members)
        if k:
            _add_texts(overall, record, words, range(k))
            _keep_smallest(sample, n, record, words, groups)

        scored = [(index, score) for index, score in enumerate(record.scores) if score is not None]
        unscored += k - len(scored)
        unscored_records += k > 0 and not scored
        no_signal += k > 0 and len({score for _, score in scored}) < 2
        if scored:
            scored_queries += 1
            pairs += len(scored) * (len(scored) - 1) // 2
            tied += sum(count * (count - 1) // 2 for count in Counter(score for _, score in scored).values())
            _add_scores(sources, overall, record, scored)
            _add_lengths(across, within, record, scored)

    answered = n - ks[0]
    result: dict[str, Any] = {
        "n": n,
        "responses": overall.responses,
        "k": {str(k): ks[k] for k in sorted(ks)},
        "lengths": {
            "query": {unit: _length_summary(lengths[f"query_{unit}"]) for unit in ("words", "characters")},
            "response": {unit: _length_summary(lengths[unit]) for unit in ("words", "characters")},
        },
        "finish": dict(sorted(finish.items())),
        "truncated": _share(finish["length"], overall.responses),
        "empty_responses": empty,
        "duplicates": {"responses": duplicates, "queries": duplicate_queries},
        "diversity": _diversity(sources, overall, sample),
        "scores": _scores_summary(overall, scored_queries, overall.responses) if scored_queries else None,
        "scores_by_source": {
            name: _scores_summary(source, scored_queries, overall.responses)
            for name, source in sorted(sources.items())
            if source.scores
        },
        "ties": {"pairs": pairs, "tied": tied, "share": _share(tied, pairs)},
        "score_length_correlation": {"overall": across.correlation(), "within_query": within.correlation()},
        "unscored": {"responses": unscored, "records": unscored_records},
        "no_signal": {"queries": no_signal, "share": _share(no_signal, answered)},
        "histograms": {
            "query words": _histogram(lengths["query_words"].keys(), lengths["query_words"].values()),
            "response words": _histogram(lengths["words"].keys(), lengths["words"].values()),
            "scores": _histogram(overall.scores),
            "best score of a query": _histogram(overall.maxima),
        },
    }
    result["warnings"] = _warnings(result, answered, scored_queries)
    return result


def _add_texts(source: _Source, record: Record, words: list[list[str]], members: Sequence[int]) -> None:
    source.responses += len(members)
    source.queries += 1
    source.cut += sum(record.finish[index] == "length" for index in members)
    for n in (1, 2):
        grams = [gram for index in members for gram in _grams(words[index], n)]
        if grams:
            source.distinct[n - 1] += len(set(grams)) / len(grams)
            source.distinct_queries[n - 1] += 1


def _add_scores(sources: dict[str, _Source], overall: _Source, record: Record, scored: list[tuple[int, float]]) -> None:
    best = max(score for _, score in scored)
    winners = sum(score == best for _, score in scored)
    by_source: dict[str, list[float]] = {}
    for index, score in scored:
        for name in source_names(record.sources[index]):
            by_source.setdefault(name, []).append(score)
    for name, scores in by_source.items():
        _add_query_scores(sources[name], scores)
        sources[name].wins += sum(score == best for score in scores) / winners
    _add_query_scores(overall, [score for _, score in scored])
    overall.wins += 1


def _add_query_scores(source: _Source, scores: list[float]) -> None:
    source.scores.extend(scores)
    source.maxima.append(max(scores))
    source.deviations.append(_std(scores))


def _add_lengths(across: _Moments, within: _Moments, record: Record, scored: list[tuple[int, float]]) -> None:
    """Pair each score with its response's length in characters, as they are and less the means of their query."""
    sizes = [float(len(record.responses[index])) for index, _ in scored]
    scores = [score for _, score in scored]
    for size, score in zip(sizes, scores, strict=True):
        across.add(size, score)
        # Exactly 0 where all scores are equal: a rounded mean would leave noise to correlate.
        within.add(size - _mean(sizes), score - _mean(scores) if len(set(scores)) > 1 else 0.0)


def _keep_smallest(
    sample: list[_Sampled],
    number: int,
    record: Record,
    words: list[list[str]],
    groups: dict[str, list[int]],
) -> None:
    """Keep the record among those with the smallest hashes of their ids, if it belongs there."""
    digest = -int.from_bytes(hashlib.blake2b(record.id.encode("utf-8", "replace"), digest_size=8).digest(), "big")
    if len(sample) == SELF_BLEU_QUERIES and digest < sample[0][0]:
        return
    if len(words) < 2:
        return
    kept: list[tuple[str | None, list[list[str]]]] = [(None, words[:SELF_BLEU_RESPONSES])]
    for name, members in groups.items():
        if len(members) > 1:
            kept.append((name, [words[index] for index in members[:SELF_BLEU_RESPONSES]]))
    # The number only breaks a tie, so that lists are never compared.
    push = heapq.heappush if len(sample) < SELF_BLEU_QUERIES else heapq.heappushpop
    push(sample, (digest, number, kept))


# --- measures ----------------------------------------------------------------------------------------------------


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _std(values: Sequence[float]) -> float:
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def bleu(hypothesis: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the sentence BLEU-4 of a list of words against others (Papineni et al. 2002).

    Clipped n-gram precisions for n = 1 … 4 (fewer where it has fewer words), a zero count taken as 0.1 (Chen and Cherry
    2014, method 1), their geometric mean times the brevity penalty against the closest reference length. A hypothesis
    that shares no word with a reference has 0.
    """
    logs = 0.0
    orders = min(4, len(hypothesis))
    if not orders:
        return 0.0
    for n in range(1, orders + 1):
        counts = Counter(_grams(hypothesis, n))
        ceiling: Counter[tuple[str, ...]] = Counter()
        for reference in references:
            ceiling |= Counter(_grams(reference, n))
        matched = (counts & ceiling).total()
        if n == 1 and not matched:
            return 0.0
        logs += math.log((matched or 0.1) / counts.total()) / orders
    closest = min((len(reference) for reference in references), key=lambda size: (abs(size - len(hypothesis)), size))
    penalty = min(0.0, 1 - closest / len(hypothesis))
    return math.exp(logs + penalty)


def self_bleu(responses: Sequence[Sequence[str]]) -> float:
    """Return the mean BLEU of each of two or more responses (lists of words) against the others: 1 if all are equal."""
    return _mean(
        [bleu(response, [*responses[:index], *responses[index + 1 :]]) for index, response in enumerate(responses)]
    )


def _diversity(sources: dict[str, _Source], overall: _Source, sample: list[_Sampled]) -> dict[str, Any]:
    values: dict[str | None, list[float]] = {}
    for _, _, groups in sorted(sample, key=lambda entry: entry[:2]):
        for name, responses in groups:
            values.setdefault(name, []).append(self_bleu(responses))
    return {
        "self_bleu_queries": len(sample),
        "all": _diversity_summary(overall, values.get(None, [])),
        "by_source": {
            name: _diversity_summary(source, values.get(name, [])) for name, source in sorted(sources.items())
        },
    }


def _diversity_summary(source: _Source, bleus: list[float]) -> dict[str, Any]:
    return {
        "responses": source.responses,
        "queries": source.queries,
        "truncated": _share(source.cut, source.responses),
        "distinct_1": _share(source.distinct[0], source.distinct_queries[0]),
        "distinct_2": _share(source.distinct[1], source.distinct_queries[1]),
        "self_bleu": _mean(bleus) if bleus else None,
    }


def _scores_summary(source: _Source, scored_queries: int, responses: int) -> dict[str, Any]:
    return {
        "n": len(source.scores),
        "mean": _mean(source.scores),
        "std": _std(source.scores),
        "std_within_query": _mean(source.deviations),
        "mean_of_maxima": _mean(source.maxima),
        "min": min(source.scores),
        "max": max(source.scores),
        "win_share": _share(source.wins, scored_queries),
        "response_share": _share(source.responses, responses),
    }


def _length_summary(counts: Counter[int]) -> dict[str, Any] | None:
    """Return mean, median, 95th percentile and maximum; percentiles are the nearest rank, so always a real length."""
    total = counts.total()
    if not total:
        return None
    ordered = sorted(counts.items())
    return {
        "mean": sum(size * count for size, count in ordered) / total,
        "p50": _percentile(ordered, total, 50),
        "p95": _percentile(ordered, total, 95),
        "max": ordered[-1][0],
    }


def _percentile(ordered: list[tuple[int, int]], total: int, percent: int) -> int:
    rank = -(-total * percent // 100)
    for size, count in ordered:
        rank -= count
        if rank <= 0:
            return size
    return ordered[-1][0]


def _histogram(values: Collection[float], weights: Iterable[int] | None = None) -> dict[str, Any] | None:
    """Return ``edges`` (one more than bins) and ``counts`` of values, each counted ``weights`` times (once).

    Bins of whole numbers hold equally many of them: others would show teeth that are not in the data.
    """
    if not values:
        return None
    low, high = min(values), max(values)
    if isinstance(low, int) and isinstance(high, int):
        width: float = -(-(high - low + 1) // BINS)
        bins, start = int((high - low) // width) + 1, low - 0.5
    else:
        width, bins, start = (high - low) / BINS or 1.0, BINS if high > low else 1, low if high > low else low - 0.5
    counts = [0] * bins
    for value, count in zip(values, weights or itertools.repeat(1), strict=False):
        counts[min(int((value - start) / width), bins - 1)] += count
    return {"edges": [start + width * i for i in range(bins + 1)], "counts": counts}


def _warnings(result: dict[str, Any], answered: int, scored_queries: int) -> list[str]:
    share = result["no_signal"]["share"]
    if not scored_queries or share is None or share <= NO_SIGNAL_SHARE:
        return []
    return [
        f"{result['no_signal']['queries']} of {answered} queries ({share:.0%}) carry no ranking signal: they have "
        "fewer than two distinct scores, so only their best response is fitted. Sample more, or more varied, "
        "responses, or use a reward that tells them apart."
    ]


# --- for the terminal --------------------------------------------------------------------------------------------


def _number(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"
    return str(value)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


Table = tuple[str, list[str], list[list[str]]]  # title, header, rows


def _tables(result: dict[str, Any]) -> list[Table]:
    """The result as titled tables: the one source of the terminal text and the page."""
    correlation = result["score_length_correlation"]
    answered = result["n"] - result["k"].get("0", 0)
    facts = [
        ["records", _number(result["n"])],
        ["responses", _number(result["responses"])],
        ["responses a query", ", ".join(f"{k} ({count:,})" for k, count in result["k"].items()) or "–"],
        ["finish", ", ".join(f"{name} {count:,}" for name, count in result["finish"].items()) or "–"],
        ["cut by a token limit", _percent(result["truncated"])],
        ["empty responses", _number(result["empty_responses"])],
        ["duplicates within a query", f"{result['duplicates']['responses']:,} in {result['duplicates']['queries']:,}"],
        ["unscored responses", _number(result["unscored"]["responses"])],
        ["records without a score", _number(result["unscored"]["records"])],
    ]
    if result["scores"]:
        facts += [
            [
                "tied pairs",
                f"{result['ties']['tied']:,} of {result['ties']['pairs']:,} ({_percent(result['ties']['share'])})",
            ],
            [
                "queries without a ranking signal",
                f"{result['no_signal']['queries']:,} of {answered:,} ({_percent(result['no_signal']['share'])})",
            ],
            ["score and length, correlation", _number(correlation["overall"])],
            ["… within a query", _number(correlation["within_query"])],
        ]
    tables: list[Table] = [("Records", ["", ""], facts)]
    lengths = [
        [f"{what}, {unit}", *(_number(summary[name]) for name in ("mean", "p50", "p95", "max"))]
        for what, units in result["lengths"].items()
        for unit, summary in units.items()
        if summary
    ]
    tables.append(("Lengths", ["", "mean", "p50", "p95", "max"], lengths))
    if result["responses"]:
        diversity = {**result["diversity"]["by_source"], "all": result["diversity"]["all"]}
        rows = [
            [name, _number(row["responses"]), _percent(row["truncated"])]
            + [_number(row[column]) for column in ("distinct_1", "distinct_2", "self_bleu")]
            for name, row in diversity.items()
        ]
        queries = result["diversity"]["self_bleu_queries"]
        title = f"Sources and their diversity within a query (self-BLEU on {queries} queries)"
        tables.append((title, ["source", "responses", "cut", "distinct-1", "distinct-2", "self-BLEU"], rows))
    if result["scores"]:
        columns = ("n", "mean", "std", "std_within_query", "mean_of_maxima", "min", "max")
        rows = [
            [
                name,
                *(_number(row[column]) for column in columns),
                _percent(row["win_share"]),
                _percent(row["response_share"]),
            ]
            for name, row in {**result["scores_by_source"], "all": result["scores"]}.items()
        ]
        header = ["source", "n", "mean", "std", "std in query", "mean of max", "min", "max", "wins", "of responses"]
        tables.append(("Scores", header, rows))
    return tables


def _aligned(header: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = []
    for row in ([header] if any(header) else []) + rows:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines


def format_inspection(result: dict[str, Any]) -> str:
    """Return what ``inspect_records`` measured as text for a terminal."""
    blocks = ["\n".join([title, *_aligned(header, rows)]) for title, header, rows in _tables(result)]
    blocks += [f"Warning: {warning}" for warning in result["warnings"]]
    return "\n\n".join(blocks) + "\n"


# --- for the browser ---------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --accent: #3b6ea8; --warn: #b3540033; }
@media (prefers-color-scheme: dark) { :root { --accent: #7fb0e6; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; }
.warning { background: var(--warn); border-radius: .4rem; padding: .6rem .9rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }
.charts figure { margin: 0; background: var(--soft); border-radius: .4rem; padding: .5rem; }
.charts svg { width: 100%; height: auto; }
"""

INK, ACCENT = "#010203", "#040506"  # colours the page replaces by its own, so that charts follow light and dark


def _svg(title: str, histogram: dict[str, Any]) -> str:
    """Return a histogram as an inline SVG whose colours are the page's."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    colours = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), INK)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9, **colours}):
        figure = Figure(figsize=(4.6, 2.4), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        edges = histogram["edges"]
        axes.bar(edges[:-1], histogram["counts"], width=edges[1] - edges[0], align="edge", color=ACCENT)
        axes.set_title(title)
        axes.spines[["top", "right"]].set_visible(False)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return text.replace(INK, "currentColor").replace(ACCENT, "var(--accent)")


def _table_html(title: str, header: list[str], rows: list[list[str]]) -> str:
    head = "<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in header) + "</tr>" if any(header) else ""
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<h2>{html.escape(title)}</h2><div class="scroll"><table>{head}{body}</table></div>'


def inspection_html(result: dict[str, Any], title: str = "Records") -> str:
    """Return what ``inspect_records`` measured as one HTML page that needs no network."""
    warnings = "".join(f'<p class="warning">{html.escape(warning)}</p>' for warning in result["warnings"])
    charts = "".join(
        f"<figure>{_svg(name, histogram)}</figure>" for name, histogram in result["histograms"].items() if histogram
    )
    tables = "".join(_table_html(*table) for table in _tables(result))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
        f'<body><h1>{html.escape(title)}</h1>{warnings}<div class="charts">{charts}</div>{tables}</body></html>\n'
    )
