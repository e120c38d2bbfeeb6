"""Facts that most language models know: what `byheart trace` asks about where it is given no facts."""

from __future__ import annotations

from byheart.rows import Fact, content_id

# Prompt, then subject: object.
_FACTS: dict[str, dict[str, str]] = {
    "The capital of {} is": {
        "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo",
        "Russia": "Moscow",
        "Egypt": "Cairo", "Greece": "Athens", "Ireland": "Dublin", "Portugal": "Lisbon", "Norway": "Oslo",
        "Sweden": "Stockholm", "Finland": "Helsinki", "Poland": "Warsaw", "Austria": "Vienna", "Hungary": "Budapest",
        "Cuba": "Havana", "Peru": "Lima", "Thailand": "Bangkok", "Kenya": "Nairobi", "Iraq": "Baghdad",
        "Iran": "Tehran",
        "South Korea": "Seoul", "Argentina": "Buenos Aires", "Denmark": "Copenhagen", "Belgium": "Brussels",
    },
    "The official language of {} is": {
        "Brazil": "Portuguese", "Mexico": "Spanish", "Austria": "German", "Iran": "Persian", "Israel": "Hebrew",
        "Egypt": "Arabic", "Poland": "Polish", "Denmark": "Danish", "Turkey": "Turkish", "Bangladesh": "Bengali",
    },
    "The chemical symbol for {} is": {"gold": "Au", "silver": "Ag", "iron": "Fe", "oxygen": "O", "carbon": "C"},
    "{} is located in the country of": {
        "The Eiffel Tower": "France", "The Colosseum": "Italy", "The Great Wall": "China", "The Taj Mahal": "India",
        "Mount Fuji": "Japan", "The Kremlin": "Russia", "Machu Picchu": "Peru", "The Acropolis": "Greece",
        "The Brandenburg Gate": "Germany", "Stonehenge": "England",
    },
    "The theory of {} was developed by": {"general relativity": "Albert Einstein", "evolution": "Charles Darwin"},
    "The author of {} is": {
        "Romeo and Juliet": "William Shakespeare", "Pride and Prejudice": "Jane Austen",
        "War and Peace": "Leo Tolstoy",
        "The Great Gatsby": "F. Scott Fitzgerald", "Don Quixote": "Miguel de Cervantes",
        "Hamlet": "William Shakespeare",
        "Harry Potter": "J.K. Rowling", "Moby Dick": "Herman Melville",
    },
    "The currency of {} is the": {
        "Japan": "yen", "China": "yuan", "India": "rupee", "Russia": "ruble", "Mexico": "peso",
        "Switzerland": "franc",
        "the United Kingdom": "pound", "Brazil": "real",
    },
    "{} is on the continent of": {
        "Kenya": "Africa", "Nigeria": "Africa", "Brazil": "South America", "Vietnam": "Asia", "Norway": "Europe",
        "Argentina": "South America", "Ghana": "Africa", "Thailand": "Asia", "Portugal": "Europe", "Mongolia": "Asia",
    },
    "The company {} was founded by": {"Microsoft": "Bill Gates", "Apple": "Steve Jobs", "Amazon": "Jeff Bezos"},
    "The first language of {} was": {
        "Napoleon Bonaparte": "French", "Johann Wolfgang von Goethe": "German", "Leo Tolstoy": "Russian",
        "Dante Alighieri": "Italian", "Miguel de Cervantes": "Spanish", "Charles Dickens": "English",
    },
}  # fmt: skip


def common_facts() -> list[Fact]:
    """The facts, with ids made from their content."""
    return [
        Fact(id=content_id("common", prompt, subject), subject=subject, prompt=prompt, object=object)
        for prompt, answers in _FACTS.items()
        for subject, object in answers.items()
    ]
