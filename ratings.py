"""Labels that reviews give themselves: who writes "8/10" has said whether the film is good.

Distant supervision (Read 2005, Using Emoticons to Reduce Dependency in Machine Learning Techniques
for Sentiment Classification; Go, Bhayani & Huang 2009): labels without a labeller.
"""
import re

RATING = re.compile(r"(?<![\d/.,])(\d{1,2}(?:[.,]\d+)?)\s*(?:/|out of)\s*10(?![\d/]|[.,]\d)",
                    re.IGNORECASE)  # 8/10, 7.5 / 10, 3 out of 10; no date, no 10/100
LOWEST_POS, HIGHEST_NEG = 7, 4  # what lies between has no label, as in IMDb (Maas et al. 2011)


def rated(texts):
    """Return (texts without their ratings, labels) of those texts that state a rating of 10.

    Of several ratings the last counts.

    >>> rated(["A good film, 8/10.", "Not 10/10, 2 out of 10!", "5/10", "Seen on 9/10/99."])
    (['A good film,  .', 'Not  ,  !'], ['pos', 'neg'])
    """
    found, labels = [], []
    for text in texts:
        ratings = [float(one.replace(",", ".")) for one in RATING.findall(text)]
        ratings = [one for one in ratings if one <= 10]
        if ratings and not HIGHEST_NEG < ratings[-1] < LOWEST_POS:
            found.append(RATING.sub(" ", text))
            labels.append("pos" if ratings[-1] >= LOWEST_POS else "neg")
    return found, labels
