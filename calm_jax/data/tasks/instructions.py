"""Nothing in; the many ways in which a task is asked for, out. All are ours but the paper's example of a score.

The first of each is the one that programs use, so that answers are comparable.
"""

CAPTION = (
    "Describe the picture in one sentence.",
    "What does the picture show?",
    "What is in this photograph?",
    "Give a short caption for this picture.",
    "Write one sentence about the content of the image.",
    "What can be seen here?",
    "Summarise the scene briefly.",
    "Describe what you see.",
    "Tell me in a few words what the photograph shows.",
)
COMMENT = (
    "Comment on this photograph.",
    "What do you think of the picture?",
    "Please write a short critique of this image.",
    "Give your aesthetic opinion of the photograph.",
    "How would you review this picture?",
    "What works in this photograph, and what does not?",
    "Tell the photographer what you think.",
    "Write a comment on the aesthetics of the image.",
    "Assess this photograph in words.",
)
ASPECTS = {  # what a comment can be asked to be about; not trained by itself
    "composition": "Comment on the composition of this photograph.",
    "light": "Comment on the light in this photograph.",
    "colour": "Comment on the colours of this photograph.",
    "focus": "Comment on the focus and the depth of field of this photograph.",
    "exposure": "Comment on the exposure of this photograph.",
    "subject": "Comment on the subject of this photograph.",
    "mood": "Comment on the mood of this photograph.",
    "technique": "Comment on the technical quality of this photograph.",
}
SCORE = (
    "Can you give me the aesthetic score?",  # the paper's example
    "Rate the aesthetics of this picture from 1 to 10.",
    "What is the aesthetic score of the photograph?",
    "How beautiful is the picture on a scale of 1 to 10?",
    "Give the picture a score between 1 and 10.",
    "How would you rate this photograph?",
    "Please score the image for its aesthetics.",
    "Which score does this picture deserve?",
    "Assess the photograph with a number from 1 to 10.",
)
LEVEL = (
    "Is this photograph excellent, good, fair, poor or bad?",
    "How good is the picture: excellent, good, fair, poor or bad?",
    "Judge the aesthetics in a word: excellent, good, fair, poor or bad.",
    "Which word fits this picture best, excellent, good, fair, poor or bad?",
    "Rate the photograph as excellent, good, fair, poor or bad.",
    "Please rate the image in words, from bad over poor, fair and good to excellent.",
    "What is the aesthetic level of the picture, from bad to excellent?",
    "In one word, bad, poor, fair, good or excellent: how is the photograph?",
    "Say whether the picture is bad, poor, fair, good or excellent.",
)
SUGGEST = (
    "What would improve this photograph?",
    "How could the picture be made better?",
    "Give the photographer a suggestion.",
    "What should be changed in this picture?",
    "Suggest an improvement.",
    "What would you do differently here?",
    "Please advise on how to improve the image.",
    "Which edit would help this photograph most?",
    "What is the best way to improve the picture?",
)
NOTHING_TO_IMPROVE = (
    "Nothing needs to be corrected.",
    "I would leave it as it is.",
    "There is no flaw that should be removed.",
    "The picture needs no correction.",
    "I see nothing to correct.",
    "No correction is called for.",
)
PERSONAL = (
    "Which score do I give this picture?",
    "How do I rate this photograph?",
    "What is my score for this picture, from 1 to 10?",
    "Guess my rating of this image.",
    "How much do I like this one, from 1 to 10?",
    "Which rating is mine here?",
    "Going by my ratings, which score does this picture get?",
    "What would I say to this picture, on a scale of 1 to 10?",
)


def for_reader(reader: str) -> str:
    """What programs ask for a score that is read by one of `scale.READERS`."""
    return (LEVEL if reader == "levels" else SCORE)[0]
