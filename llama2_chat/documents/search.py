"""Which chunks say most about a question: by their words and by parts of words, fused by reciprocal rank.

No model is needed, and no list of stop words: bm25 weighs what stands everywhere with next to nothing. Figures are in
docs/documents.md.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Sequence

from llama2_chat.documents.store import Chunk, Shelf

CANDIDATES = 50  # of each ranking
RANK_CONSTANT = 5  # of reciprocal rank fusion; 60, which is usual with many rankings, found less with two
MAX_WORDS = 64  # of a question: a long text would be searched for minutes
SHORTEST = 3  # letters that a trigram has

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
    words = _shortened(words_of(query))
    stems = list(dict.fromkeys(stem for word in words if len(stem := _stem(word)) >= SHORTEST))
    with shelf.reading() as db:
        rankings = [_ranking(db, "words", words, ids), _ranking(db, "trigrams", stems, ids)]
        return [_chunk(db, id) for id in fused(rankings)[:limit]]


def fused(rankings: Sequence[Sequence[int]]) -> list[int]:
    """One ranking of several, by reciprocal rank (Cormack, Clarke and Büttcher, 2009)."""
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, id in enumerate(ranking, 1):
            scores[id] = scores.get(id, 0) + 1 / (RANK_CONSTANT + rank)
    return sorted(scores, key=lambda id: -scores[id])


def _shortened(words: list[str]) -> list[str]:
    return words if len(words) <= MAX_WORDS else [word for word in words if word not in FUNCTION_WORDS][:MAX_WORDS]


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


def _chunk(db: sqlite3.Connection, id: int) -> Chunk:
    query = "SELECT c.id, document, name, page, text FROM chunks c JOIN documents d ON d.id = document WHERE c.id = ?"
    return Chunk(*db.execute(query, (id,)).fetchone())
