"""A small grammar of children's stories: it draws random stories, and gives the exact probability of any text.

The corpus that it writes therefore has a known entropy, and the loss of a model trained on it can be compared with the
best loss that any model could reach.

The grammar is the two tables at the end of this file. A rule is a list of options, the likelier ones first. An option
is text:

    <color>        draws an option of the rule `color` and writes it
    <goal:toy>     the same, and remembers the option's first words under the name `goal`
    {goal}         writes them again: this is how characters and things stay the same throughout a story
    {he=she}       remembers without writing; {he} then writes "she" and {He} writes "She"

Why probabilities are exact: every option begins with literal words, its head, which are written when the option is
chosen, and no head of a rule is a prefix of another head of that rule (the tests check the whole table). So the choices
can be read off a story from left to right. One program, `_tell`, walks the grammar for two drivers: `_Writer` makes
each choice with a random number, `_Reader` finds it in the text. Each text has one derivation, and its probability is
the product over its choices.

Weights are integers, and the only randomness is `rng.random()`: a seed gives the same story on every platform.
"""

import functools
import math
import re
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import numpy as np

STORY = "<opening> {He} <habit>. {His} <friendship>\nOne <weather> <daytime>, <plot>\n<ending>"


def draw(rng: np.random.Generator) -> str:
    """Draw one story."""
    return draw_scored(rng)[0]


def draw_scored(rng: np.random.Generator) -> tuple[str, float]:
    """Draw one story.

    Returns:
        The story, and the natural logarithm of its probability, summed while drawing.
    """
    writer = _Writer(rng)
    _tell(_compile(STORY), writer, {})
    return "".join(writer.words), writer.log_prob


def log_prob(text: str) -> float:
    """Natural logarithm of the probability that `draw` returns exactly this text; -inf if it never does."""
    reader = _Reader(text)
    try:
        _tell(_compile(STORY), reader, {})
    except _NotAStory:
        return -math.inf
    return reader.log_prob if reader.position == len(text) else -math.inf


@dataclass(frozen=True, slots=True)
class _Draw:
    """The step `<rule>` or `<name:rule>`."""

    rule: "_Rule"
    name: str | None


@dataclass(frozen=True, slots=True)
class _Recall:
    """The step `{name}` or `{Name}`."""

    name: str
    capitalize: bool


@dataclass(frozen=True, slots=True)
class _Note:
    """The step `{name=value}`."""

    name: str
    value: str


_Step = str | _Draw | _Recall | _Note


@dataclass(frozen=True, slots=True)
class _Option:
    """One option of a rule: the words that distinguish it, what follows them, and its log-probability."""

    head: str
    rest: tuple[_Step, ...]
    log_prob: float


@dataclass(frozen=True, slots=True, eq=False)
class _Rule:
    """A compiled rule, for both drivers."""

    options: tuple[_Option, ...]
    cumulative_weights: tuple[int, ...]
    heads: re.Pattern[str]
    by_head: dict[str, _Option]


class _Driver(Protocol):
    """What `_tell` needs: something that makes choices and takes words."""

    def choose(self, rule: _Rule) -> _Option: ...

    def write(self, words: str) -> None: ...


class _Writer:
    """Draws: a random number makes each choice."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.random = rng.random
        self.words: list[str] = []
        self.log_prob = 0.0

    def choose(self, rule: _Rule) -> _Option:
        """Draw an option and write its head."""
        weights = rule.cumulative_weights
        option = rule.options[bisect_right(weights, int(self.random() * weights[-1]))]
        self.words.append(option.head)
        self.log_prob += option.log_prob
        return option

    def write(self, words: str) -> None:
        """Append words to the story."""
        self.words.append(words)


class _Reader:
    """Recognises: each choice is the option whose head comes next in the text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.log_prob = 0.0

    def choose(self, rule: _Rule) -> _Option:
        """Find the one option whose head comes next, and move past the head."""
        match = rule.heads.match(self.text, self.position)
        if match is None:
            raise _NotAStory
        self.position = match.end()
        option = rule.by_head[match.group()]
        self.log_prob += option.log_prob
        return option

    def write(self, words: str) -> None:
        """Move past words that must come next."""
        if not self.text.startswith(words, self.position):
            raise _NotAStory
        self.position += len(words)


class _NotAStory(Exception):
    """The text is not in the language."""


def _tell(steps: tuple[_Step, ...], driver: _Driver, memory: dict[str, str]) -> None:
    """Walk the steps; the driver makes the choices and takes the words."""
    for step in steps:
        if isinstance(step, str):
            driver.write(step)
        elif isinstance(step, _Draw):
            option = driver.choose(step.rule)
            if step.name:
                memory[step.name] = option.head
            _tell(option.rest, driver, memory)
        elif isinstance(step, _Recall):
            words = memory[step.name]
            driver.write(words.capitalize() if step.capitalize else words)
        else:
            memory[step.name] = step.value


_SLOT = re.compile(r"<(?:(\w+):)?(\w+)>|\{(\w+)(?:=(\w+))?\}")


@functools.cache
def _compile(text: str) -> tuple[_Step, ...]:
    """Turn an option's text into steps."""
    steps: list[_Step] = []
    end = 0
    for slot in _SLOT.finditer(text):
        if slot.start() > end:
            steps.append(text[end : slot.start()])
        end = slot.end()
        drawn_name, rule, name, value = slot.groups()
        if rule:
            steps.append(_Draw(_rule(rule), drawn_name))
        elif value:
            steps.append(_Note(name, value))
        else:
            steps.append(_Recall(name.lower(), name[0].isupper()))
    if end < len(text):
        steps.append(text[end:])
    return tuple(steps)


@functools.cache
def _rule(name: str) -> _Rule:
    """Compile a rule of the tables, with Zipf-Mandelbrot weights 1 / (rank + 1 + n / 8) over its n options."""
    texts = SENTENCES[name] if name in SENTENCES else tuple(WORDS[name].split())
    weights = [10**6 // (8 * rank + 8 + len(texts)) for rank in range(len(texts))]
    options = []
    for text, weight in zip(texts, weights, strict=True):
        head, *rest = _compile(text)
        if not isinstance(head, str):
            raise TypeError(f"rule {name!r}: an option begins with a slot: {text!r}")
        options.append(_Option(head, tuple(rest), math.log(weight / sum(weights))))
    heads = re.compile("|".join(re.escape(option.head) for option in options))
    return _Rule(tuple(options), tuple(accumulate(weights)), heads, {option.head: option for option in options})


# The tables. Words are in order of intended frequency, and none needs "an" where its rule follows "a". Things that
# could be confused within a story are different rules: toys, for instance, are looked for and found, tools only used.

SENTENCES = {
    "opening": (
        "Once upon a time there was a <trait> <child>. {hero} lived in a <cozy> <home> near the <land> with {his} "
        "<elder:elder>.",
        "In a <cozy> <home> by the <land> there lived a <trait> <child>. {hero} had a <trait> <elder:elder>.",
        "Long ago there was a <trait> <child>. {hero} and {his} <elder:elder> had a <cozy> <home> behind the <land>.",
    ),
    "child": (
        "girl named <hero:girl>{he=she}{him=her}{his=her}",
        "boy named <hero:boy>{he=he}{him=him}{his=his}",
    ),
    "habit": (
        "loved <meal> with <fruit> and liked to play <game>",
        "always wore a <color> <garment> and kept <fruit> in a <container>",
        "knew songs about <fruit>, <flower>, and <bug>",
        "often gave <flower> to {his} {elder} and <sweet> to the <bug>",
    ),
    "friendship": (
        "best friend was a <color> <animal> named <friend:pet>. {friend} wore a <garment> and played the <instrument>.",
        "dearest friend was a <trait> <animal> named <friend:pet>. {friend} slept in a <look> <container>.",
        "neighbor was a <look> <animal> named <friend:pet>. {friend} ate only <sweet> and <fruit>.",
    ),
    "plot": (
        # A toy is lost and found.
        'the <look> <goal:toy> was gone. "Where is my {goal}?" cried {hero}. {He} looked under the <furniture> and in '
        "the <container>, but found only a <tool>, some <fruit>, and a <color> <garment>.\n"
        '"<comfort>," said {friend}. They <moved> past the <land> to the <place> and met a <trait> <worker:worker>. '
        'The {worker} was <doing> a <instrument>. "<clue>," the {worker} said <adverb>.\n'
        "So {hero} and {friend} <moved> there. Between some <flower> and a few <bug> lay the {goal}! "
        '{hero} felt <glad>. "You are a <trait> friend," {he} told {friend} <adverb>.',
        # A hard thing is learned.
        "a <trait> <worker:worker> came to the <place>. The {worker} began to <goal:skill>, and a <instrument> played "
        '<adverb>. "I want to {goal} too," said {hero}. {He} tried it with a <look> <tool>, but there was a <sound>, '
        "and {hero} fell into a <container> of <fruit>. The <bug> laughed, and {he} felt <sad>.\n"
        '"<advice>," said {friend}. So {hero} put on a <color> <garment> and practiced <adverb> for <number> days near '
        "the <tree> tree.\n"
        "At last {hero} could {goal}! The {worker} clapped <adverb> and gave {him} a <look> <toy>. "
        '"Nobody can {goal} like you," said {friend}. {hero} felt <glad>.',
        # Somebody in need is helped.
        "there was a <sound> behind the <flower>, and {hero} found a <trait> <goal:beast>. The {goal} looked <sad>. "
        '"<trouble>," said the {goal} <adverb>.\n'
        "{hero} <moved> to the <place> and met a <worker:worker>. The {worker} gave {him} a <tool>, some <material>, "
        "and a <container> of <meal>. Then {friend} pulled <adverb>, {hero} pushed <adverb>, and with a <sound> the "
        "{goal} stood up again.\n"
        '"You are so <trait>," said the {goal}. "Now I am <glad>." It gave {hero} a <color> <toy> and showed {friend} '
        "the best <fruit> near the <land>.",
        # Something is built, and breaks, and runs again.
        'some <material> and a <color> <container> lay behind the <tree> tree. "Let us build a <goal:vehicle>," said '
        "{hero}. They worked on the {goal} for <number> hours. {friend} painted it <color> and tied a <look> "
        "<instrument> to the front.\n"
        "They traveled past the <land> and met a <trait> <worker:worker>. The {worker} was <doing> a <furniture>. Then "
        'there was a <sound>, and the {goal} stopped. {hero} felt <sad>. "<repair>," the {worker} said <adverb>. '
        "{friend} did it, and the {goal} ran again.\n"
        "Soon they came to the <place>. They ate <meal>, saw <number> <bug>, and danced with a <beast>. "
        '"Our {goal} is the best," {hero} said <adverb>, and {he} felt <glad>.',
        # A wish is given up for somebody else.
        "with <number> coins in {his} <container>, {hero} went to the <place> to buy a <look> <goal:toy>. The {goal} "
        'belonged to a <trait> <worker:worker>. "It costs all your coins," the {worker} said <adverb>.\n'
        'Just then {hero} met a <trait> <guest:beast>. The {guest} looked <sad>. "I lost my <garment> near the <land>, '
        'and I have had no <meal> for <number> days," said the {guest}. So {hero} bought some <sweet> and a <color> '
        "<tool> for the {guest}, and {friend} smiled <adverb>.\n"
        '"You are so <trait>," said the {worker}. "Take the {goal}, it is yours." {hero} felt <glad>, and they all '
        "played <game> with the {goal}.",
    ),
    "comfort": ("Please do not be <sad>", "Let us look for it together", "My <body> tells me that it is not far"),
    "clue": (
        "I heard a <sound> near the <tree> tree",
        "A <beast> took it to the <tree> tree",
        "Go and look by the <tree> tree",
    ),
    "advice": ("Eat some <meal> and try again", "Be as <trait> as a <beast>", "Think of <flower> and try again"),
    "trouble": (
        "My <body> is stuck in a <look> <container>",
        "I fell over a <tool> and hurt my <body>",
        "The wind took my <garment>, and my <body> is cold",
    ),
    "repair": ("You need a <tool> and some <material>", "Try it with <sweet> and a <garment>", "Hit it with a <tool>"),
    "ending": (
        "That evening {his} {elder} made <meal> with <fruit>. {hero} went to bed early and dreamed of a <color> "
        "<vehicle> and a <look> <beast>.",
        "When night came, {hero} and {friend} sat by the <furniture> with <sweet>. "
        '"I hope tomorrow will be <weather>," {hero} said <adverb>, and {his} {elder} kissed {him} good night.',
        "From that day on, {hero} and {friend} were never <sad> again. They often went to the <land> with <meal>, "
        "<sweet>, and a <look> <tool>.",
        "After that there was a party with <meal> and <sweet>. {friend} played the <instrument>, a <worker> danced "
        "with {his} {elder}, and {hero} sang <adverb> until the stars came out.",
    ),
}

WORDS = {
    "girl": """
        Lily Mia Anna Lucy Sara Ella Nora Ruby Clara Daisy Molly Ivy Zoe Maya Alice Amy Grace Jane Kate Luna
        Maria Nina Polly Tina""",
    "boy": """
        Tom Ben Max Sam Leo Tim Jack Finn Noah Jake Luke Adam Oscar Peter Paul Henry Hugo Theo Toby Simon Victor
        Walter Frank George""",
    "pet": """
        Biscuit Pepper Button Muffin Pebble Ginger Snowy Patch Dusty Bubbles Cocoa Fluffy Socks Sparky Cookie
        Rusty Mittens Pickle Sunny Tango Twinkle Bandit Clover Comet Domino Echo Marble Scout""",
    "elder": """
        mother father grandma grandpa aunt uncle sister brother""",
    "trait": """
        kind brave curious clever cheerful gentle shy quiet lively friendly polite good bold bright busy calm
        careful caring charming daring dreamy fair fearless funny graceful helpful hopeful humble jolly joyful
        loving loyal merry modest neat noisy patient playful plucky proud quick sensible serious silly sleepy
        smart sweet talkative thoughtful tidy warm wild wise witty zany stubborn hungry nimble""",
    "cozy": """
        cozy crooked tall narrow little wooden mossy stone brick simple sturdy drafty dainty grand royal lonely
        shabby sunlit peaceful hidden comfy spacious rustic haunted windy thatched round leafy snug roomy
        ramshackle creaky""",
    "home": """
        house cottage cabin hut farmhouse tower castle tent treehouse windmill barn bungalow mansion palace
        lighthouse wagon lodge shack flat villa caravan manor mill shed den inn chalet hall room igloo bakehouse
        stable""",
    "land": """
        river forest lake hill meadow mountain sea garden valley pond field beach village woods bridge road
        stream island orchard park cave cliff canyon creek desert dunes fountain gate glade harbor hedge jungle
        lagoon marsh moor ocean path pasture quarry railway reef rocks shore spring square station swamp town
        trail tunnel vineyard volcano wall waterfall well wharf brook bay gorge ridge""",
    "place": """
        market bakery library school museum zoo fair shop theater playground circus bank church clinic college
        dairy gallery greenhouse gym hospital hotel kitchen laundry nursery pier pool porch restaurant stadium
        studio tavern temple workshop yard campsite courtyard depot dock airport aquarium arcade cafe pharmacy
        barbershop""",
    "worker": """
        baker farmer teacher doctor sailor painter gardener tailor shepherd postman nurse clown juggler potter
        miller pilot king queen knight wizard witch pirate captain cobbler magician hunter mayor singer""",
    "animal": """
        dog cat rabbit mouse fox bear duck frog pony turtle squirrel hedgehog kitten puppy goat lamb pig hen
        hamster deer beaver parrot donkey badger monkey panda penguin tiger lion seal raccoon koala lizard goose
        swan chipmunk ferret gecko llama mole newt rooster sheep skunk toad weasel zebra camel giraffe kangaroo
        hippo wolf walrus robin sparrow crow dove""",
    "beast": """
        dragon whale moose peacock crab dolphin falcon heron leopard lobster pelican porcupine puffin raven
        rhino shark snail snake spider stork turkey hawk bull calf gnome troll giant fairy""",
    "look": """
        big small little tiny shiny pretty soft long strange new heavy broken dusty smooth fancy plain striped
        spotted painted fuzzy bumpy glittering wobbly muddy squeaky wide thick thin flat curly woolly sparkling
        polished patched knitted carved folded tangled torn wrinkled magic secret special perfect famous foreign
        modern splendid marvelous beautiful gorgeous handsome delicate solid hollow pointed slender chunky lumpy
        puffy silky sticky slippery scratchy prickly bent rough faded glossy gleaming dazzling delightful
        lopsided""",
    "color": """
        red blue green yellow purple pink brown gray white black golden silver violet scarlet turquoise crimson
        beige lavender maroon creamy bronze tan dark pale navy""",
    "fruit": """
        apples pears plums cherries grapes berries peaches bananas oranges lemons strawberries blueberries
        raspberries melons nuts carrots beans peas tomatoes potatoes pumpkins mushrooms onions radishes turnips
        apricots almonds walnuts chestnuts figs dates limes mangoes olives raisins peppers cucumbers cabbages
        beets hazelnuts cranberries currants coconuts leeks lentils parsnips pineapples quinces acorns seeds""",
    "meal": """
        soup bread cheese pancakes rice noodles porridge stew toast fish pasta pie salad sandwiches waffles
        dumplings pizza omelets ham corn chili crackers curry fritters gravy lasagna meatballs muffins oatmeal
        pickles popcorn ravioli rolls sausages scones spaghetti tacos trout yogurt biscuits broth buns casserole
        cereal chowder croissants custard falafel macaroni eggplant""",
    "sweet": """
        honey jam candy cookies chocolate fudge jelly caramel toffee marshmallows gumdrops syrup tarts cupcakes
        doughnuts gingerbread brownies lollipops licorice taffy marzipan sherbet sprinkles truffles wafers
        peppermints macaroons shortbread lemonade cider tea milk juice cream""",
    "flower": """
        roses daisies tulips lilies violets sunflowers poppies buttercups daffodils bluebells clovers ferns
        orchids pansies lilacs marigolds dandelions irises snowdrops primroses weeds reeds grasses bushes
        thistles nettles cactuses carnations crocuses dahlias foxgloves hyacinths jasmines lotuses magnolias
        peonies petunias zinnias""",
    "tree": """
        oak pine apple birch maple willow cherry pear fir beech chestnut elm ash cedar palm walnut plum lemon
        olive poplar spruce hazel fig peach cypress linden redwood sycamore banyan mulberry""",
    "bug": """
        bees butterflies ants birds beetles snails spiders worms ladybugs crickets dragonflies moths fireflies
        grasshoppers caterpillars bats owls larks finches swallows wrens doves gulls ducklings chicks minnows
        tadpoles goldfish crabs frogs mice lizards swans cranes hummingbirds magpies storks kittens puppies
        lambs""",
    "tool": """
        spoon rope hammer lantern candle broom shovel needle pencil brush comb bell key book map net mirror
        pillow blanket towel ticket cup plate bowl fork knife kettle pot pan mop saw wrench nail screw hook pin
        ribbon feather coin stamp postcard letter notebook crayon ruler magnet telescope camera clock watch lamp
        torch flag fan tray teapot saucer bottle cork sponge wheel pulley peg rake hoe spade trowel napkin
        cushion curtain carpet hairbrush bandage thimble zipper buckle chain lock lid ladle mug whisk
        thermometer stick""",
    "toy": """
        ball doll kite puppet ring crown necklace marble puzzle robot dinosaur medal trophy diary wand scooter
        jewel pearl diamond whistle rattle sword shield mask frisbee locket teddy tiara""",
    "garment": """
        hat coat scarf jacket sweater shirt vest cloak belt shawl raincoat hood bonnet robe beret cardigan
        jumper poncho tunic pullover helmet headband bandana backpack sash waistcoat kimono turban blouse jersey
        parka sunhat""",
    "container": """
        basket box bag bucket jar barrel chest drawer suitcase pouch crate sack tub pail tin trunk pocket
        wheelbarrow hamper purse jug cupboard wardrobe locker cradle bin carton cage case cauldron flowerpot
        lunchbox mailbox pitcher satchel shoebox teacup toolbox vase bathtub fishbowl hatbox""",
    "furniture": """
        bed table chair sofa bench stove shelf desk rug piano bookcase fireplace cabinet dresser mattress stool
        counter couch crib door window sink radiator hammock staircase""",
    "instrument": """
        drum flute violin guitar trumpet harp horn banjo cello fiddle tuba bugle clarinet cymbal gong harmonica
        kazoo lute mandolin tambourine trombone xylophone saxophone piccolo recorder triangle""",
    "material": """
        wood paper cardboard glass wool cotton straw clay string leather rubber silk steel iron copper brass
        bamboo bark canvas chalk cloth foil fur glue hay lace linen mud plastic plaster sand satin twigs velvet
        wax wicker wire yarn""",
    "vehicle": """
        boat raft cart sled train plane rocket ship canoe bicycle glider tractor truck van bus coach ferry
        trolley kayak carriage""",
    "game": """
        tag hopscotch catch chess cards checkers dominoes marbles football tennis soccer baseball basketball
        leapfrog charades darts dice golf hockey jacks kickball badminton pretend pirates bingo ludo croquet
        rugby""",
    "skill": """
        swim dance sing juggle skate climb paint knit sew whistle write read draw ride sail surf spell count
        yodel dive hop jump skip spin""",
    "doing": """
        fixing washing painting cleaning drawing carrying polishing selling mending moving packing sorting
        wrapping holding making measuring dusting hiding lifting oiling opening balancing buying checking
        dragging drying folding inspecting pushing repairing rinsing scrubbing shaking studying trading waving
        weighing wiping""",
    "moved": """
        walked ran hopped skipped raced marched climbed crept danced dashed drove flew galloped hiked hurried
        jogged jumped leaped paraded rode rolled rushed sailed skated slid sneaked sped stomped strolled swam
        tiptoed traveled trotted trudged tumbled wandered waddled wiggled zoomed bounced scampered scurried""",
    "adverb": """
        softly quietly quickly slowly loudly happily gently bravely kindly proudly politely sweetly eagerly
        shyly calmly carefully cheerfully boldly brightly busily clearly cleverly curiously dreamily excitedly
        firmly fondly gladly gracefully gratefully hopefully hungrily joyfully lazily merrily modestly nervously
        nicely nimbly patiently playfully promptly seriously sleepily smoothly solemnly suddenly swiftly
        tenderly thoughtfully warmly wisely wildly""",
    "sound": """
        bang crash splash squeak whisper knock thump rustle pop buzz hum click clatter creak drip growl giggle
        hiss howl honk moan rumble scratch sigh snap sneeze snore squawk thud tap tinkle twang whoosh yawn yelp
        cough""",
    "sad": """
        sad worried scared lonely afraid upset tired cross angry gloomy nervous frightened unhappy puzzled
        confused helpless sorry grumpy hopeless weary miserable anxious ashamed jealous startled troubled dizzy
        disappointed""",
    "glad": """
        happy glad proud joyful thankful excited delighted pleased grateful lucky relieved content thrilled
        amazed peaceful loved overjoyed blissful wonderful terrific great fantastic strong""",
    "weather": """
        sunny rainy windy cloudy foggy snowy warm cold chilly frosty stormy hot gray misty breezy cool crisp
        drizzly dull fine freezing hazy icy mild pleasant clear quiet dry wet muggy""",
    "daytime": """
        morning day afternoon Sunday Saturday Friday Monday Tuesday Wednesday Thursday""",
    "number": """
        three two four five six seven ten eight nine twelve eleven twenty""",
    "body": """
        leg tail foot nose ear neck back paw toe knee tummy chin tongue shoulder tooth finger head eye elbow
        ankle hip thumb belly arm lip""",
}
