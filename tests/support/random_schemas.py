"""Tools with parameters of all kinds, drawn at random."""


def random_tools(rng, count):
    return [{"name": f"tool_{n}", "description": "Does it.", "parameters": _object(rng, 2)} for n in range(count)]


def _object(rng, depth):
    names = rng.sample(["city", "from_date", "limit", "tags", "é", "who is it", "x", "nested"], rng.randint(0, 4))
    schema = {"type": "object", "properties": {name: _schema(rng, depth) for name in names}}
    if rng.random() < 0.7:
        schema["required"] = [name for name in names if rng.random() < 0.7]
    if rng.random() < 0.5:
        schema["additionalProperties"] = False
    return schema


def _schema(rng, depth):
    kinds = [_string, _integer, _number, _choice, lambda rng: {"type": rng.choice(["boolean", "null"])}]
    if depth and rng.random() < 0.4:
        return rng.choice([_object, _array, _either])(rng, depth - 1)
    return rng.choice(kinds)(rng)


def _string(rng):
    return rng.choice(
        [
            {"type": "string", "maxLength": 12},
            {"type": "string", "minLength": 2, "maxLength": 20, "description": "some words"},
            {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{1,4}$"},
            {"type": "string", "format": "date"},
            {"type": "string", "enum": ["a", "b b", 'c"c', "日本"]},
        ]
    )


def _integer(rng):
    low = rng.randint(-100, 100)
    return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 1000)}


def _number(rng):
    return {"type": "number", "minimum": 0, "maximum": rng.choice([1, 2.5, 100])}


def _choice(rng):
    return rng.choice([{"const": "fixed"}, {"enum": [1, "two", None, True]}, {"enum": ["north", "south"]}])


def _array(rng, depth):
    return {"type": "array", "items": _schema(rng, depth), "minItems": rng.randint(0, 1), "maxItems": rng.randint(1, 3)}


def _either(rng, depth):
    return {"anyOf": [_schema(rng, depth), {"type": "null"}]}
