"""The dozen questions that the demo's students answer: each asks for an answer longer than the demo samples."""

PROMPTS = (
    "Explain step by step how a bicycle stays upright while it is moving.",
    "Tell a story about a lighthouse keeper who finds a letter in a bottle.",
    "How do I cook a vegetable soup from scratch? Give every step.",
    "Describe the journey of a drop of water from the ocean to a mountain and back.",
    "Write a detailed plan for someone who wants to learn the guitar in a year.",
    "What happens inside a star from its birth to its death?",
    "Compare living in a small village with living in a large city.",
    "Explain to a child how plants turn sunlight into food.",
    "Write a letter to a friend about a week of hiking in the mountains.",
    "How did people measure time before there were mechanical clocks?",
    "Explain how to add the fractions 3/4 and 2/5, and check the answer.",
    "Describe how a book is made, from the first idea to the shelf of a shop.",
)
