"""Which chunks say most about a question: by their words and by parts of words, fused by reciprocal rank, and with
them, where there is an encoder, by their meaning.

No model is needed, and no list of stop words: bm25 weighs what stands everywhere with next to nothing. Figures are in
docs/documents.md.
"""

from __future__ import annotations

import json
import re
import sqlite3
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

from llama2_chat.documents.meaning import by_meaning, embedded_question
from llama2_chat.documents.store import Chunk, Shelf

CANDIDATES = 50  # of each ranking
RANK_CONSTANT = 5  # of reciprocal rank fusion; 60, which is usual with many rankings, found less with two
MAX_WORDS = 64  # of a question: a long text would be searched for minutes
LONGEST_WORD = 40  # letters of it that are searched for
MAX_LETTERS = 1_000  # of all that is searched for in one index: SQLite takes memory and time for each
SHORTEST = 3  # letters that a trigram has
MAX_PAIRS = 8  # of letters, for which all chunks are looked through
# Thai, Chinese, Japanese and others that write no blanks between words, with Korean, which glues them together.
UNSPACED = re.compile("[\u0e00-\u0e7f\u2e80-\U0010ffff]+")

# Words that say nothing about what is asked, in the languages that most visitors write.
_FUNCTION_WORDS = """
a about an and any are as at be been but by can could did do does for from had has have he her here his how i if in
into is it its just me more my no not of on one or our please she should so some tell than that the their them then
there these they this those to too us was we were what when where which who whom whose why will with would yes you
your aber als am auch auf aus bei bin bis bitte da das dass dem den denn der des die dies diese dieser dieses doch
du ein eine einem einen einer eines er es für hat ich ihr ihre im ist ja kann man mehr mein mir mit nach nein nicht
noch nur oder sich sie sind um und uns von vor war warum weil welche welcher welches wenn wer wie wir wo zu zum zur
au aux avec ce ces cette comme dans de elle est et il ils je la le les leur mais mon ne nous ou où par pas plus pour
pourquoi quand que quel quelle qui sa se ses son sont sur un une vous al como con cuando cuál del dónde el ella en
esta este las lo los más mi muy o para pero por qué quién sin su sus una y
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())


def words_of(text: str) -> list[str]:
    """Its different words in small letters, in their order."""
    return list(dict.fromkeys(re.findall(r"\w+", text.lower())))


def content_words(text: str) -> list[str]:
    return [word for word in words_of(text) if word not in FUNCTION_WORDS]


def search(shelf: Shelf, query: str, ids: Sequence[str], limit: int = 5) -> list[Chunk]:
    """The chunks of these documents that fit the query best, best first."""
    words = [word[:LONGEST_WORD] for word in _shortened(words_of(query))]
    spaced = _shortened(words_of(UNSPACED.sub(" ", query)))
    stems = [stem for word in spaced if len(stem := _stem(word[:LONGEST_WORD])) >= SHORTEST]
    parts = _capped([*stems, *_trigrams(query)])
    pairs = [run for run in _unspaced(query) if len(run) == SHORTEST - 1][:MAX_PAIRS]
    question = embedded_question(shelf.embedder, query)  # before a reader keeps others from truncating the log
    with shelf.reading() as db:
        rankings = [_ranking(db, "words", _capped(words), ids), _ranking(db, "trigrams", parts, ids)]
        rankings.append(_with_pairs(db, pairs, ids))
        found = fused(rankings)
        if question is not None:
            meant = by_meaning(db, ids, *question)
            found = fused([found, meant, meant])  # twice: in another language words find next to nothing
        return [_chunk(db, id) for id in found[:limit]]


def fused(rankings: Sequence[Sequence[int]]) -> list[int]:
    """One ranking of several, by reciprocal rank (Cormack, Clarke and Büttcher, 2009)."""
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, id in enumerate(ranking, 1):
            scores[id] = scores.get(id, 0) + 1 / (RANK_CONSTANT + rank)
    return sorted(scores, key=lambda id: -scores[id])


def _shortened(words: list[str]) -> list[str]:
    return words if len(words) <= MAX_WORDS else [word for word in words if word not in FUNCTION_WORDS][:MAX_WORDS]


def _capped(terms: Iterable[str]) -> list[str]:
    """The first of the different terms that have MAX_LETTERS together."""
    capped, left = [], MAX_LETTERS
    for term in dict.fromkeys(terms):
        left -= len(term)
        if left < 0:
            break
        capped.append(term)
    return capped


def _unspaced(text: str) -> list[str]:
    """Runs of letters that have no blanks between words, with their vowel signs, of as much text as is searched for."""
    runs: list[str] = []
    left = MAX_LETTERS
    for match in UNSPACED.finditer(text):
        run = match[0][:left]
        left -= len(run)
        runs += "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in run).split()
        if not left:
            break
    return list(dict.fromkeys(runs))


def _trigrams(text: str) -> Iterator[str]:
    for run in _unspaced(text):
        yield from (run[start : start + SHORTEST] for start in range(len(run) - SHORTEST + 1))


def _stem(word: str) -> str:
    """Most languages change words at their end, and German glues them together: this is found within others."""
    return word[:-2] if len(word) >= 7 else word


def _ranking(db: sqlite3.Connection, index: str, terms: list[str], ids: Sequence[str]) -> list[int]:
    if not terms:
        return []
    match = " OR ".join(f'"{term}"' for term in terms)  # in quotes nothing is an operator; \w has no quotes
    query = (
        f"SELECT chunks.id FROM {index} JOIN chunks ON chunks.id = {index}.rowid WHERE {index} MATCH ? "
        f"AND document IN (SELECT value FROM json_each(?)) ORDER BY {index}.rank LIMIT {CANDIDATES}"
    )
    return [id for (id,) in db.execute(query, (match, json.dumps(list(ids))))]


def _with_pairs(db: sqlite3.Connection, pairs: list[str], ids: Sequence[str]) -> list[int]:
    """Words of two letters, too short for trigrams: the chunks with most of them."""
    if not pairs:
        return []
    count = " + ".join(["(instr(text, ?) > 0)"] * len(pairs))
    query = (
        f"SELECT id, {count} AS hits FROM chunks WHERE document IN (SELECT value FROM json_each(?)) AND hits "
        f"ORDER BY hits DESC, id LIMIT {CANDIDATES}"
    )
    return [id for id, _ in db.execute(query, (*pairs, json.dumps(list(ids))))]


def _chunk(db: sqlite3.Connection, id: int) -> Chunk:
    query = "SELECT c.id, document, name, page, text FROM chunks c JOIN documents d ON d.id = document WHERE c.id = ?"
    return Chunk(*db.execute(query, (id,)).fetchone())
