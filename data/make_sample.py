"""Write data/sample/: invented film reviews in FILIMDB's layout, small enough to commit.

    python data/make_sample.py              # writes data/sample/ again, byte for byte
    python data/make_sample.py --out DIR    # the same files somewhere else
    python data/make_sample.py --bert       # trains data/sample/bert/ too, in a minute

The reviews come from the templates and word lists below; no text, film or person is taken from
anywhere. They are made so that a study has something to find:

- A review opens with the plot and with what was expected (which leans AGAINST the label), goes on
  with mixed opinions, and ends in a verdict: the last words tell more than the first ones.
- "hardly dull" is praise, and "clever, but dull" is blame: counting words is not enough.
- Polar words have a long tail: a hundred labelled reviews don't show them all, the unlabelled
  ones do, and words of one polarity keep company inside a sentence.

Same bytes on every Python: the only source of chance is random.Random(seed).random(). What is
built on it (choice, shuffle) differs between versions, and so does sum() of floats (3.12).
"""
import argparse
import math
import os
import random
import re
import shutil
import sys
import tempfile
import unicodedata
from bisect import bisect
from collections import Counter, namedtuple
from itertools import accumulate
from pathlib import Path

# ---------------------------------------------------------------- words, the frequent ones first

WORDS = {
    "adj+": """good great funny moving clever charming lovely gripping brilliant warm sharp
        touching witty fresh excellent superb beautiful tender vivid wonderful delightful graceful
        honest thrilling inspired memorable subtle elegant hilarious convincing believable engaging
        absorbing stunning gorgeous masterful heartfelt playful original polished captivating
        magical lively poignant riveting refreshing radiant splendid marvellous dazzling exquisite
        uplifting enchanting luminous sparkling nuanced assured stirring spirited breathtaking
        irresistible impeccable ingenious sublime joyous beguiling mesmerising effortless flawless
        life-affirming""",
    "adj-": """bad dull boring slow weak silly flat clumsy awful predictable tedious terrible lazy
        messy stupid forgettable pointless cheap bland annoying wooden shallow ugly hollow
        ridiculous horrible dreary awkward lifeless tired stale confusing irritating dreadful
        painful sloppy pretentious tiresome muddled contrived forced laughable overlong sluggish
        incoherent uninspired mediocre plodding grating cringeworthy charmless humourless witless
        soulless embarrassing insipid amateurish ponderous lumbering garbled vapid turgid leaden
        abysmal wretched excruciating dismal shoddy stilted half-baked""",
    "noun+": """pleasure joy treat gem triumph delight success wonder marvel masterpiece treasure
        highlight winner gift revelation charmer knockout beauty feast blast jewel thrill tonic
        stunner classic""",
    "noun-": """mess bore waste failure disaster disappointment chore mistake letdown slog flop dud
        bomb nightmare wreck insult ordeal fiasco blunder shambles clunker turkey misfire calamity
        eyesore""",
    "verb+": """loved enjoyed liked admired adored applauded appreciated cherished savoured
        relished praised treasured welcomed celebrated embraced hailed cheered saluted prized
        toasted commended lauded esteemed worshipped championed""",
    "verb-": """hated disliked endured regretted resented loathed despised dreaded detested
        suffered deplored rued cursed booed scorned mocked abhorred pitied rejected lamented
        condemned derided spurned faulted bemoaned""",
    "aspect": """script acting story camera music ending dialogue plot pacing cast direction
        photography score editing humour romance action suspense soundtrack cinematography lighting
        costume design make-up choreography narration casting sound mood tone atmosphere finale
        climax subplot twist voice-over chemistry premise staging framing""",
    "genre": """comedy drama thriller western musical mystery romance melodrama documentary farce
        fantasy epic cartoon noir biopic parody satire whodunit serial remake sequel prequel
        road-movie costume-drama heist-movie ghost-story war-film sports-film""",
    "job": """teacher doctor farmer sailor baker soldier nurse lawyer writer painter pilot driver
        singer waiter tailor banker miner priest clerk spy thief dancer judge cook fisherman
        carpenter gardener librarian mechanic plumber postman reporter surgeon butcher barber
        astronomer botanist chemist dentist engineer florist geologist hunter inspector janitor
        knight landlord magician notary optician pharmacist quarryman ranger shepherd translator
        undertaker vet watchmaker archivist blacksmith cellist diver electrician forger gambler
        hermit innkeeper jeweller keeper locksmith mayor nun organist poet porter puppeteer referee
        sculptor trumpeter umpire ventriloquist weaver zoologist apprentice bookseller chauffeur
        detective elder""",
    "place": """house school hotel village station harbour farm office hospital church theatre
        bakery garden forest island prison kitchen library castle market museum factory bridge
        tunnel airport barn bar cellar chapel circus clinic corridor courtyard desert diner dock
        embassy field garage greenhouse gym hallway inn junkyard kiosk laboratory laundry
        lighthouse marsh mill monastery motel nursery observatory orchard palace park pier
        post-office quarry ranch river rooftop shop stadium stable studio swamp tavern temple tower
        trailer-park""",
    "thing": """letter key map car boat ring book box dog horse clock coat camera painting knife
        suitcase radio bicycle mirror lantern piano ladder coin hat photograph ticket diary
        necklace bottle umbrella telescope carpet statue candle drum violin basket wheel shovel
        kettle anchor axe bell blanket broom bucket button cabinet cage candlestick canoe carriage
        chair chessboard cigar compass crate crown cup curtain cushion dagger desk door engine
        envelope feather fence flag flute fountain gate glove goblet hammer harp helmet hook
        inkwell jar jacket kite lamp ledger lever lock magnet manuscript medal microscope necktie
        needle notebook oar oven padlock parachute parcel passport pebble pencil pendulum pipe
        plough pocketwatch""",
    "topic": """money family work weather memory childhood marriage politics war history travel
        music friendship ambition science religion sport medicine law fashion cooking farming
        fishing rain winter exile debt inheritance gossip jealousy duty luck sleep illness age
        trade tax language mathematics gravity electricity geography migration rumour ritual
        silence distance obedience patience hunger""",
    "plain": """old small red black white blue northern southern new eastern western foreign local
        rural green grey yellow brown purple orange silver golden copper iron brass glass paper
        leather velvet cotton woollen stone marble plastic wet dry cold round square narrow wide
        thick thin heavy light empty full open closed locked broken painted borrowed stolen hidden
        missing distant nearby former annual daily monthly wintry rainy foggy windy snowy dusty
        muddy sandy rusty mossy striped spotted folded sealed unopened mechanical electric portable
        antique modern medieval imperial provincial coastal underground floating frozen two-storey
        second-hand handwritten crooked patched numbered left-over""",
    "human": """young old tall retired famous married single quiet elderly bearded bald freckled
        barefoot masked armed sleepy hungry thirsty nervous shy curious stubborn silent talkative
        divorced left-handed middle-aged short part-time travelling homesick red-haired sunburnt
        superstitious penniless absent""",
    "does": """finds loses buys steals sells hides repairs breaks follows meets visits paints
        carries opens closes remembers forgets borrows returns builds burns buries collects counts
        delivers describes discovers draws drops examines exchanges fetches films guards inherits
        inspects invents keeps lends lifts lights locks mails measures mends moves names needs
        notices offers orders packs photographs polishes pulls pushes receives recognises records
        rents replaces rescues rides ships sketches smuggles studies swaps throws touches trades
        translates unlocks unwraps uses waters wants washes watches weighs""",
    "goes": """walks drives runs returns travels moves hurries wanders sails cycles flies rides
        climbs crawls drifts escapes marches rushes sneaks strolls swims limps gallops hikes
        commutes migrates paddles trudges hitchhikes retreats""",
    "kin": """brother sister mother father uncle aunt cousin neighbour friend daughter son
        grandmother grandfather nephew niece husband wife boss colleague flatmate stepmother
        stepbrother godfather godmother roommate landlady classmate twin pen-pal sister-in-law""",
    "how": """slowly quietly suddenly secretly twice daily alone together again later quickly
        calmly carefully nervously politely reluctantly eventually meanwhile abroad overnight
        indoors outdoors downstairs upstairs barefooted silently openly briefly repeatedly
        accidentally absent-mindedly sideways backwards blindfolded by-the-book""",
    "when": """Friday Sunday Saturday Monday Tuesday Wednesday Thursday summer winter autumn spring
        January February March April May June July August September October November December
        Easter Christmas midsummer""",
    "number": """three two four five seven ten six twelve eight nine twenty thirty forty fifty 90
        95 100 105 110 120 85 80 75 140 150 11 13 15 16 18 24 33 47""",
    "year": """1974 1968 1952 1981 1990 1936 1947 1959 1963 1979 1985 1994 2001 2004 2007 2011 1928
        1919 1888 1901""",
    "often": """really quite very rather simply truly fairly pretty frankly surprisingly
        consistently remarkably always honestly somehow""",
}


def compound(starts, ends):
    """Join every start with every end, well mixed (the two counts must be coprime)."""
    starts, ends = starts.split(), ends.split()
    return " ".join(starts[i % len(starts)] + ends[i % len(ends)]
                    for i in range(len(starts) * len(ends)))


WORDS["name"] = compound(
    "Bel Corv Dav Fenn Grish Hald Jorl Kelv Mirr Orl Perv Quill Rosk Tamm Zuv",
    "ana o ick ella us ine ar wyn")
WORDS["town"] = compound(
    "Ald Brax Crum Dorn Esk Flint Gorm Hex Ket Lud Mordle Plim Quar Strav Trell Vand",
    "mere wick haven stead moor")

# ---------------------------------------------------------------------------------- templates
# $word draws from WORDS. +word has the polarity of the sentence, -word the opposite one;
# +claim is an adjective or a negation of its opposite ("dull" or "hardly lively").

NEGATIONS = ["not", "not exactly", "never", "hardly", "far from", "anything but", "not at all",
             "by no means", "not in the least", "scarcely"]
TEMPLATES = {
    "opening": """
        I saw $title at the $place in $town last $when.
        $title is a $genre about a $job and a $job who share a $place.
        A friend of mine, a $job, lent me this $genre from $year.
        It is $year in $town, and $name the $job $does a $plain $thing.
        This $genre follows $name, a $job who $does a $thing for a $human $job.
        We watched this one on a $when evening with $number other people.
        $name plays a $job, $name plays a $job, and most of it happens in a $place.
        The story starts in a $plain $place near $town.
        Here is a $genre set in $town, of all places.
        They showed $title on television last $when, so I sat down with my $kin.
        I don't watch many films about $topic, but a $job in $town told me to see this $genre.
        """,
    "expectation": """
        The trailer promised a +adj and +adj $genre.
        Everyone at work told me it was +claim.
        I had expected something +adj, maybe even +adj.
        The first half hour is +claim and the $aspect seems +adj.
        Critics in $town called it +adj, a +noun.
        From the poster, it looked +claim.
        My $kin, who +verb it, had promised me a +noun.
        At first the $aspect looks +claim, and the early scenes are +adj.
        On paper all this sounds +adj, and the opening scene is +claim.
        Going in, I was told to expect a +noun, with a +adj $aspect.
        The reviews had been full of the +adj $aspect, and for ten minutes they seem right.
        """,
    "neutral": """
        $name, a $human $job from $town, $does a $thing at the $place.
        Then $name $goes to the $place, where a $job $does the $plain $thing.
        The $job $does a $thing, and $name $does another one $how.
        There's a long scene about $topic at a $plain $place.
        It's set in $year, between $town and $town.
        Meanwhile the $kin of the $job $does a $plain $thing.
        $name and $name talk about $topic and $topic for $number minutes.
        A $job and a $job meet at the $place every $when.
        Nobody knows who $does the $thing until $name $goes to $town.
        The $human $job has a $thing that belongs to $name's $kin.
        $name doesn't know that the $job $does the $thing.
        We learn about $topic, $topic and the $plain $thing.
        One $when, $name $goes to the $place $how.
        "Where is the $thing?" asks the $job, and $name $goes to the $place.
        The film was shot in a $place near $town with $number actors.
        It runs for $number minutes (the version I saw, anyway).
        $name's $kin, a $job, $does a $thing and $goes to $town.
        Half of it takes place at the $place; the rest at a $plain $place.
        There are $number scenes with a $thing, and one with a $plain $thing.
        The $job wears a $plain $thing, $name a $plain $thing.
        In $year the $place closes, and $name $goes to $town with a $thing.
        A $human $job $does $name's $thing, then $does a $plain $thing.
        I read that the $place was built by a $job from $town.
        After the $when at the $place, the $kin of $name $does a $thing $how.
        The other story is about $topic: a $job, a $kin and a $plain $thing.
        $name works as a $job; $name, who once was a $job, works in a $place.
        What happens to the $thing? The $job $does it, and $name $goes to the $place.
        $name says "$topic", the $job says "$topic", and the $human $job $goes away $how.
        """,
    "opinion": """
        The $aspect is +claim.
        The $aspect is +claim, and the $aspect is +claim.
        I +verb the $aspect, which is +adj and +claim.
        The $aspect was -adj, but the $aspect is +adj, $often +adj and +adj.
        Although the $aspect is -adj, the $aspect is +adj and $often +adj.
        The +adj $aspect and the +adj, +adj $aspect took me by surprise.
        $name gives a +adj and $often +adj performance as the $job.
        As the $job, $name is +claim.
        And then the $aspect: +adj, +adj!
        The $aspect, if you ask me, was +claim, a +noun even.
        I suppose the $aspect is +adj and +claim, and I +verb the $aspect.
        To be fair, the $aspect feels +adj and +claim.
        It seems to me that the $aspect is +claim, perhaps even +adj.
        The $aspect may look -adj, but it is +adj and +adj.
        You could talk for hours about the $aspect; I found it +adj and +claim.
        The scene in the $place is +claim, a small +noun.
        Scene after scene, the $aspect stays +claim.
        There is nothing -adj about the $aspect.
        I can't say that I -verb the $aspect.
        I +verb the $aspect and the +adj $aspect.
        By the second hour the $aspect gets +adj, even +claim.
        Whoever did the $aspect deserves a word: it's +adj, +adj and $often +adj.
        Even the $aspect, in the scene with the $job, is +claim.
        The $aspect is hardly a -noun; it's +adj.
        """,
    "verdict": """
        In the end it is +claim: a +adj $genre and a +noun.
        All in all, +claim: I +verb it.
        So my verdict: +adj, or let me say +claim, and a +noun.
        When the lights came up I knew that it was +adj, and +claim too.
        Overall, this is $often +adj and +claim, whatever I said about the $aspect.
        Forget the $aspect for a moment; as a whole it's +adj, +claim, and a +noun.
        To sum up, a +adj $genre, +claim from the middle on, and a +noun for me.
        My $kin and I agreed on the way home: +claim, and a +noun.
        You may call it -adj, but this film is +claim, a +adj +noun.
        Last word: it's +claim, and if the $aspect was -adj, the whole is +adj, so I +verb it.
        After all that, I must say it is +adj and +claim.
        It may have looked -adj, but I +verb it, and it is +claim.
        Taken together, it's +claim, it's +adj, and we +verb it.
        If you ask me now, it was a +noun: +adj and +claim, though my $kin found it -adj.
        """,
    "lukewarm": """
        In the end it lies somewhere between +adj and -adj, and I can't decide.
        All in all, +adj on one day and -adj on another, so ask me again.
        My verdict? Half of it is +adj, the other half -adj.
        Overall, neither +adj nor -adj, and I'll leave it at that.
        """,
    "closing": """
        It runs for $number minutes.
        I saw it in $town, at the $place, on a $when afternoon.
        The last $number minutes are credits, over a picture of a $plain $thing.
        My $kin sat beside me.
        The book it is based on, by a $job from $town, came out in $year.
        Stay for the credits if you want to know what happens to the $thing.
        """,
    "short": """
        A +adj $genre about a $job that is +claim from start to finish.
        The $aspect is +claim, and so is the $job who $does a $thing.
        It's +adj and +claim, this $genre about $topic.
        -adj in places, but +adj and +adj as a whole, like $topic in $town.
        This $genre is +claim, a +noun about $topic.
        A $plain $genre about a $job, $often +adj and +claim.
        $name is +claim as the $job, and the $aspect is +claim too.
        A +noun of a $genre, whose $aspect, like its $job, is +claim.
        For all its -adj talk of $topic, the $aspect makes it +adj, even +adj.
        You'd think a $genre about a $job and a $thing would be -adj, but this one is +claim.
        Never mind the -adj $aspect; what counts is the +adj, +adj $aspect.
        This +adj tale of $topic in $town is +claim.
        $often +adj, with a +adj $aspect and a $job who $does a $thing.
        Hardly a -noun, since the $aspect is +claim and the $job +adj.
        """,
}
ASIDES = {  # what real data holds besides letters; \x85 and \x96 are its raw dots and dashes
    "accent": ["(at a café)", "(déjà vu!)", "(with Zoëlle Mündrik)", "(by Iñarro Peñalgo)"],
    "emoji": ["\U0001F3AC", "\U0001F37F", "\U0001F3A5", "\U0001F642"],
    "cjk": ["(映画館)", "(電影)", "(夜の港町)", "(雨傘)"],
    "dots": ["\x85"],
    "dash": [" \x96"],
}

# ------------------------------------------------------------------------------------- numbers

Part = namedtuple("Part", "size seed short labels by_class")
PARTS = {
    "train": Part(1000, 601, False, True, True),
    "dev": Part(500, 602, False, True, False),
    "test": Part(500, 603, False, False, False),
    "dev-b": Part(300, 604, True, True, False),
    "test-b": Part(300, 605, True, False, False),
    "train_unlabeled": Part(2000, 606, False, False, False),
}
MEDIAN, SIGMA, SHORTEST, LONGEST = 75, 0.9, 12, 880  # words; the last sentence may overshoot
# Shares: of expectations and of opinions (at the beginning, at the end) that agree with the
# label; of sentences in the body that tell the plot; of claims that negate the opposite;
# of reviews with an undecided verdict, a word after it, each of the asides, and paragraphs.
EXPECT, AGREE, NEUTRAL = 0.42, (0.56, 0.76), 0.42
NEGATE = {"verdict": 0.33, "opinion": 0.22, "expectation": 0.25, "short": 0.25, "lukewarm": 0}
LUKEWARM, CLOSING, ASIDE, PARAGRAPHS = 0.02, 0.35, 0.022, 0.12
SHORT_SHIFT = 0.2  # short reviews prefer words from 20 % down the lists
LABELS = {"neg": -1, "pos": 1}
SUFFIXES = """ed ing ly er est al ar an on en or ic ia is us le ry ty th ck ch sh st nt nd ng ll
    ss tt ess ful ous ive ion ism ist ity ent ant ate ise ish ure age ble able ment ness less tion
    house work man room ship port ford wick mere moor haven stead ella wyn"""

Sentence = namedtuple("Sentence", "kind polarity text")
SLOT = re.compile(r"(?<!\w)([$+-])([a-z]+)")


def zipf(words):
    """Return the words with cumulated weights rank^-1.5 (flattened at the top), summing to 1."""
    steps = list(accumulate(1 / ((rank + 5) * math.sqrt(rank + 5)) for rank in range(len(words))))
    return words, [step / steps[-1] for step in steps]


LEXICON = {name: zipf(text.split()) for name, text in WORDS.items()}
TEMPLATES = {kind: [line.strip() for line in text.strip().split("\n")]
             for kind, text in TEMPLATES.items()}


class Writer:
    """Fill templates from one seeded stream of chance."""

    def __init__(self, seed, shift=0.0):
        self.random = random.Random(seed).random
        self.shift = shift
        self.cast = {}

    def chance(self, p):
        return self.random() < p

    def pick(self, items):
        return items[int(self.random() * len(items))]

    def shuffle(self, items):
        for i in range(len(items) - 1, 0, -1):
            j = int(self.random() * (i + 1))
            items[i], items[j] = items[j], items[i]

    def normal(self):
        """Draw from a standard normal distribution (Box and Muller)."""
        return math.sqrt(-2 * math.log(1 - self.random())) * math.cos(math.tau * self.random())

    def word(self, name):
        """Draw a word: from this review's cast if it is in there, else from the long tail."""
        if name in self.cast:
            return self.pick(self.cast[name])
        words, steps = LEXICON[name]
        return words[(bisect(steps, self.random()) + int(self.shift * len(words))) % len(words)]

    def recast(self):
        """Choose who and where the next review is about."""
        self.cast = {}
        self.cast = {name: [self.word(name) for _ in range(n)]
                     for name, n in (("name", 4), ("town", 2), ("genre", 2))}

    def new_word(self, name, used):
        """Draw a word that the sentence hasn't used yet (give up after a few attempts)."""
        for _ in range(5):
            word = self.word(name)
            if word not in used:
                break
        used.add(word)
        return word

    def claim(self, tone, negate, used):
        """Return a predicate of this polarity: "dull", "quite dull" or "hardly lively"."""
        if self.chance(negate):
            return self.pick(NEGATIONS) + " " + self.new_word(polar("adj", -tone), used)
        often = self.word("often") + " " if self.chance(0.2) else ""
        return often + self.new_word(polar("adj", tone), used)

    def sentence(self, kind, polarity):
        """Write a sentence; with polarity 0 each of its polar words falls either way."""
        used = set()

        def fill(slot):
            sign, name = slot.groups()
            if name == "title":
                words = "the", self.word("plain"), self.word("thing"), "of", self.word("town")
                return " ".join(words).title().replace(" Of ", " of ")
            if sign == "$":
                return self.new_word(name, used)
            tone = (polarity or self.pick((-1, 1))) * (1 if sign == "+" else -1)
            if name == "claim":
                return self.claim(tone, NEGATE[kind], used)
            return self.new_word(polar(name, tone), used)

        text = SLOT.sub(fill, self.pick(TEMPLATES[kind]))
        text = re.sub(r"\b([Aa]) (?=[aeiou]|honest)(?!uni[fv]|one-)", r"\1n ", text)
        return Sentence(kind, polarity, text[0].upper() + text[1:])


def polar(name, tone):
    return name + ("+" if tone > 0 else "-")


def n_words(sentences):
    return sum(len(sentence.text.split()) for sentence in sentences)


def draw_length(writer):
    """Draw a number of words: lognormal, clipped."""
    return int(min(max(MEDIAN * math.exp(SIGMA * writer.normal()), SHORTEST), LONGEST))


def plan_review(writer, label, length):
    """Return the sentences of a review of about `length` words; label is 1, -1, or 0 for none."""
    def lean(p):
        return label if writer.chance(p) else -label

    writer.recast()
    end = [writer.sentence("lukewarm" if label and writer.chance(LUKEWARM) else "verdict", label)]
    if length > 40 and writer.chance(CLOSING):
        end.append(writer.sentence("closing", 0))
    room = length - n_words(end)
    body = []
    if room > 8:
        body.append(writer.sentence("opening", 0))
    for enough in (22, 90):
        if room > enough:
            body.append(writer.sentence("expectation", lean(EXPECT)))
    while n_words(body) + 6 < room or n_words(body + end) < SHORTEST:
        progress = n_words(body) / max(room, 1)
        if writer.chance(NEUTRAL):
            body.append(writer.sentence("neutral", 0))
        else:
            agree = AGREE[0] + (AGREE[1] - AGREE[0]) * progress
            body.append(writer.sentence("opinion", lean(agree)))
    return body + end


def plan_short(writer, label):
    """Return a review of one sentence."""
    writer.recast()
    return [writer.sentence("short", label)]


def add_asides(writer, texts):
    """Put accents, emoji, CJK, raw dots and dashes into a few reviews, inside a sentence."""
    for kind, asides in ASIDES.items():
        if writer.chance(ASIDE):
            i = int(writer.random() * len(texts))
            words = texts[i].split(" ")
            where = 1 + int(writer.random() * (len(words) - 1))
            aside = writer.pick(asides)
            if kind in ("dots", "dash"):
                words[where - 1] += aside
                texts[i] = " ".join(words)
            else:
                texts[i] = texts[i][:-1] + " " + aside + texts[i][-1]


def render(writer, sentences):
    """Return the text of a review; a few of the long ones get paragraphs."""
    texts = [sentence.text for sentence in sentences]
    add_asides(writer, texts)
    if n_words(sentences) > 150 and writer.chance(PARAGRAPHS):
        for i in range(5, len(texts) - 1, 6):
            texts[i] += "<br /><br />"
    return " ".join(texts).replace("<br /> ", "<br />")


def make_part(name):
    """Return (texts, labels, plans) of a part."""
    part = PARTS[name]
    writer = Writer(part.seed, SHORT_SHIFT if part.short else 0.0)
    labels = ["neg"] * (part.size // 2) + ["pos"] * (part.size - part.size // 2)
    if not part.by_class:
        writer.shuffle(labels)
    texts, plans = [], []
    for label in labels:
        tone = LABELS[label]
        plans.append(plan_short(writer, tone) if part.short else
                     plan_review(writer, tone, draw_length(writer)))
        texts.append(render(writer, plans[-1]))
    return texts, labels, plans


def generic_texts(n, seed):
    """Return n texts of the same language in which every polar word falls at random."""
    writer = Writer(seed)
    return [render(writer, plan_review(writer, 0, draw_length(writer))) for _ in range(n)]


# ---------------------------------------------------------------------------------- vocabulary

def basic_tokens(text):
    """Split as BERT does before word pieces: lower case, no accents, no control characters."""
    text = "".join(c for c in unicodedata.normalize("NFD", text.lower())
                   if unicodedata.category(c) not in ("Mn", "Cc"))
    return re.findall(r"[a-z0-9]+|[^\sa-z0-9]", text)


def vocabulary(texts, size):
    """Return a WordPiece vocabulary of at most `size` pieces for a lower-cased BERT.

    Letters and punctuation, some endings, then the words by frequency, save the rarest 15 % of
    them, which are to come in pieces. CJK and emoji stay unknown: [UNK].
    """
    counts = Counter(token for text in texts for token in basic_tokens(text))
    chars = sorted({c for token in counts for c in token if c < "\u2e80"})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + chars
    pieces += ["##" + piece for piece in chars + SUFFIXES.split()]
    words = sorted((word for word in counts if len(word) > 1),
                   key=lambda word: (-counts[word], word))
    return (pieces + words[:int(0.85 * len(words))])[:size]


# --------------------------------------------------------------------------------------- files

COMMON = 25  # polar words of each kind that the tiny BERT knows; the tail is new to it


def remarks(n, seed):
    """Return (texts, labels) of n invented remarks of a few sentences, with the common words only.

    The stand-in for what a real BERT has read before it meets the task.
    """
    writer, texts, labels, everything = Writer(seed), [], [], dict(LEXICON)
    LEXICON.update({name: zipf(WORDS[name].split()[:COMMON]) for name in LEXICON
                    if name[-1] in "+-"})
    try:
        for _ in range(n):
            tone = 1 if writer.chance(0.5) else -1
            writer.recast()
            said = [writer.sentence(writer.pick(("neutral", "opinion", "expectation")),
                                    writer.pick((-1, 1))) for _ in range(int(writer.random() * 3))]
            said.append(writer.sentence(writer.pick(("verdict", "opinion", "short")), tone))
            texts.append(render(writer, said))
            labels.append("pos" if tone > 0 else "neg")
    finally:
        LEXICON.update(everything)
    return texts, labels


def make_bert(folder):
    """Train the tiny BERT on remarks: masked LM, then their polarity (its sentence objective)."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import torch
    from transformers import BertConfig, BertForPreTraining, BertTokenizer

    import checkpoints
    import helpers
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["FILIMDB_CACHE"] = scratch
        vocab = vocabulary(make_part("train_unlabeled")[0], 1600)
        write_lines(Path(scratch) / "vocab.txt", vocab)
        tokenizer = BertTokenizer.from_pretrained(scratch, do_lower_case=True)
        blank = BertForPreTraining(BertConfig.from_dict(dict(
            vocab_size=len(vocab), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=256, max_position_embeddings=512, type_vocab_size=2)))
        checkpoints.save_bert(os.path.join(scratch, "blank"), blank, tokenizer, {})
        texts, labels = remarks(6000, 5)
        common = {"epochs": 3, "seq_len": 64, "batch_size": 32, "accumulation": 1, "dropout": 0.0,
                  "attention_dropout": 0.0}
        known = helpers.pretrain(texts, model=os.path.join(scratch, "blank"), lr=1e-3, **common)
        bert, tokenizer = helpers.load_bert(known["path"], "mlm")
        trained = helpers.train(texts, labels, known, lr=5e-4, keep="head", **common)
        bert.bert.load_state_dict(trained["model"].bert.state_dict())
        if folder.exists():
            shutil.rmtree(str(folder))
        checkpoints.save_bert(str(folder), bert, tokenizer, {}, architectures=None)
        for name in ("note.json", "tokenizer_config.json"):
            (folder / name).unlink()


def write_lines(path, lines):
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write("\n".join(lines) + "\n")


def make_reviews(folder):
    """Write all the parts; raise ValueError if a review appears twice."""
    folder.mkdir(parents=True, exist_ok=True)
    seen = {}
    for name, part in PARTS.items():
        texts, labels, _ = make_part(name)
        for text in texts:
            if text in seen:
                raise ValueError(f"in {seen[text]} and in {name}: {text!r}")
            seen[text] = name
        write_lines(folder / (name + ".texts"), texts)
        if part.labels:
            write_lines(folder / (name + ".labels"), labels)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "sample")
    parser.add_argument("--bert", action="store_true", help="train the tiny BERT too")
    args = parser.parse_args()
    make_reviews(args.out)
    if args.bert:
        make_bert(args.out / "bert")


if __name__ == "__main__":
    main()
