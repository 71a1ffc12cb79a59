"""Words and sentence templates of the demo stories.

Templates hold slots, ``{hero}``, and choices, ``(went|ran)``, which nest; `corpus.py` fills them in. What
depends on mood is keyed either by *level* (-2 clearly sad ... 2 clearly happy) or by *sign* (-1, 0, 1).
"""

from dataclasses import dataclass


def _split(words: str) -> tuple[str, ...]:
    """Split a comma-separated list."""
    return tuple(word.strip() for word in words.split(","))


@dataclass(frozen=True)
class Subject:
    """What one kind of story is made of; places carry the preposition that goes with them."""

    places: tuple[str, ...]
    things: tuple[str, ...]
    critters: tuple[str, ...]
    tasks: tuple[str, ...]
    scenes: dict[int, tuple[str, ...]]


SUBJECTS: dict[str, Subject] = {
    "sea": Subject(
        places=_split("at the harbour, on the beach, at the lighthouse, on the old pier, in the little bay"),
        things=_split("shell, net, boat, lantern, bucket, rope, flag"),
        critters=_split("gull, crab, seal, duck"),
        tasks=_split(
            "mend the nets, look for shells, paint the boat, count the waves, tie up the boats, "
            "gather driftwood, catch some fish"
        ),
        scenes={
            0: (
                "the waves rolled in and out",
                "the tide was going out",
                "a ship passed far away",
                "the boats rocked on the water",
                "the sand was (wet|dry)",
            ),
            1: (
                "the sun sparkled on the water",
                "a fair wind filled the sails",
                "the fishermen sang a (cheerful|happy) song",
                "the warm waves were lovely",
                "the boats came home safe with a treasure of fish",
            ),
            -1: (
                "a (terrible|cruel) storm broke the mast",
                "the boat was lost in the fog",
                "the cold sea looked angry",
                "the wind tore the sails and ruined the nets",
                "someone had stolen the oars",
            ),
        },
    ),
    "garden": Subject(
        places=_split("in the garden, at the pond, in the greenhouse, in the orchard, by the rose hedge"),
        things=_split("spade, basket, flower pot, kite, watering can, bench, swing"),
        critters=_split("robin, bee, hedgehog, snail, rabbit"),
        tasks=_split(
            "plant the beans, water the roses, pick the apples, rake the leaves, dig a hole, sweep the path,"
            "cut the grass"
        ),
        scenes={
            0: (
                "the leaves moved in the wind",
                "the grass was (wet|long|short)",
                "a gate opened and closed",
                "the beans were as tall as the wall",
                "bees went from flower to flower",
            ),
            1: (
                "the roses were (beautiful|lovely) in the sun",
                "the apples were sweet and perfect",
                "the whole garden was full of joy",
                "the flowers had won a prize",
                "a (gentle|friendly) breeze brought a sweet smell",
            ),
            -1: (
                "the frost had killed the roses",
                "the apples were rotten and ugly",
                "the hail destroyed the flowers",
                "the pond was dirty and smelled bad",
                "the old tree was sick and dying",
            ),
        },
    ),
    "town": Subject(
        places=_split("at the market, in the town square, at the station, in the library, at the toy shop"),
        things=_split("hat, letter, umbrella, map, coat, clock, ticket"),
        critters=_split("pigeon, dog, cat, pony"),
        tasks=_split(
            "buy some bread, post a letter, wait for the train, look at the clocks, carry the bags, "
            "read the signs, cross the street"
        ),
        scenes={
            0: (
                "the bus stopped at the corner",
                "the clock struck (two|three|four|five|six)",
                "people walked up and down the street",
                "a train came in and went out again",
                "the shops opened one by one",
            ),
            1: (
                "the band played a (merry|joyful) tune",
                "the whole street smiled and cheered",
                "the lights were pretty and everyone was friendly",
                "the baker gave free cakes to everyone",
                "there was a wonderful party with music and dancing",
            ),
            -1: (
                "the crowd was (rude|angry) and loud",
                "a thief ran off with the money",
                "the streets were dirty and sad",
                "there was a bad accident at the corner",
                "a fire destroyed the (bakery|old shop)",
            ),
        },
    ),
    "kitchen": Subject(
        places=_split("in the kitchen, at the bakery, in the cellar, at the inn, at the long table"),
        things=_split("spoon, pot, cup, cake, jar, apron, plate"),
        critters=_split("mouse, cat, spider, puppy"),
        tasks=_split(
            "bake a cake, peel the potatoes, stir the soup, wash the dishes, set the table, make some tea,cut the bread"
        ),
        scenes={
            0: (
                "the kettle was on the stove",
                "the soup was on the table",
                "the clock on the wall ticked",
                "steam rose from the pot",
                "there were six eggs in the bowl",
            ),
            1: (
                "the cake was (delicious|perfect)",
                "the kitchen was warm and full of laughter",
                "everyone loved the sweet pie",
                "the soup tasted (great|wonderful)",
                "a delicious smell made everyone smile",
            ),
            -1: (
                "the cake was burnt and horrible",
                "the milk was sour and the bread was bad",
                "the soup tasted (awful|terrible)",
                "hot oil burned {his} hand",
                "there was nothing left but hunger and misery",
            ),
        },
    ),
    "mountain": Subject(
        places=_split("on the mountain, at the hut, in the valley, on the high pass, by the lake"),
        things=_split("stick, tent, sledge, blanket, bell, bag, whistle"),
        critters=_split("goat, eagle, fox, deer"),
        tasks=_split(
            "climb to the top, light a small fire, follow the path, put up the tent, gather wood, "
            "fill the bottles, look for the trail"
        ),
        scenes={
            0: (
                "snow lay on the peaks",
                "the path went up and up",
                "clouds passed over the valley",
                "the stream ran over the stones",
                "a bell rang somewhere below",
            ),
            1: (
                "the view from the top was (beautiful|glorious|amazing)",
                "the sun shone warm and bright on the snow",
                "the hut was cosy and the soup was good",
                "the stars were wonderful",
                "the brave climbers sang with joy",
            ),
            -1: (
                "an avalanche destroyed the hut",
                "the path was dangerous and the ice was cruel",
                "a (terrible|horrible) storm trapped everyone",
                "the fire died and the cold was painful",
                "a climber fell and was badly hurt",
            ),
        },
    ),
    "school": Subject(
        places=_split("at school, in the classroom, in the playground, in the music room, at the school gate"),
        things=_split("book, pencil, ball, drum, picture, ruler, notebook"),
        critters=_split("hamster, squirrel, turtle, sparrow"),
        tasks=_split(
            "read a long book, draw a map, learn a new song, write a story, clean the board, "
            "count to a hundred, practise the drum"
        ),
        scenes={
            0: (
                "the bell rang at nine",
                "the teacher wrote on the board",
                "the children sat in two rows",
                "chalk dust lay on the floor",
                "the lesson was about rivers",
            ),
            1: (
                "the class laughed at a funny story",
                "the teacher praised the excellent work",
                "the children won the game and cheered",
                "the music was (beautiful|lovely)",
                "there was a fun party after class",
            ),
            -1: (
                "the bigger boys were mean and cruel",
                "the test was a (terrible|horrible) failure",
                "the teacher was angry and (unfair|upset)",
                "the others teased {him} and laughed at {his} tears",
                "everyone lost the game and blamed {him}",
            ),
        },
    ),
    "farm": Subject(
        places=_split("in the barn, on the farm, at the mill, in the wheat field, in the stable"),
        things=_split("cart, hay fork, saddle, ladder, wheel, milk pail, sack"),
        critters=_split("lamb, hen, horse, cow, goose"),
        tasks=_split(
            "feed the hens, milk the cows, mend the fence, brush the horse, bring in the hay, fill the sacks,"
            "sweep the barn"
        ),
        scenes={
            0: (
                "the cows stood under the trees",
                "the hens walked about the yard",
                "the mill wheel turned",
                "the hay was in the barn",
                "a cart went down the lane",
            ),
            1: (
                "the harvest was rich and everyone was glad",
                "the new lamb was healthy and sweet",
                "the farmers danced at the harvest party",
                "the horse won the great race",
                "the golden fields were beautiful",
            ),
            -1: (
                "the harvest was (ruined|lost) in the flood",
                "a wolf killed two lambs",
                "the old horse was sick and in pain",
                "the barn burned down in the night",
                "a poor crop left everyone hungry and worried",
            ),
        },
    ),
    "forest": Subject(
        places=_split("in the forest, at the cabin, by the river, under the great oak, on the wooden bridge"),
        things=_split("axe, lamp, feather, box, key, flute, ring"),
        critters=_split("owl, bear, squirrel, frog, wolf"),
        tasks=_split(
            "gather mushrooms, pick berries, follow the tracks, build a shelter, chop some wood, "
            "cross the river, look for the key"
        ),
        scenes={
            0: (
                "the trees stood in long rows",
                "leaves fell on the path",
                "the river ran under the bridge",
                "an owl called twice",
                "there was moss on the stones",
            ),
            1: (
                "the birds sang a (happy|lovely) song",
                "the forest was peaceful and beautiful",
                "the berries were sweet and good",
                "light danced between the friendly trees",
                "a kind stranger shared a delicious pie",
            ),
            -1: (
                "a wild fire destroyed the trees",
                "the forest was dark and scary",
                "the berries were bad and made {him} sick",
                "the bridge broke and the river was dangerous",
                "a cruel trap had hurt a deer",
            ),
        },
    ),
}

WOMEN = _split(
    "Mara, Anna, Lily, Nora, Ella, Ida, Rosa, Clara, Maya, Tess, Ruth, Zoe, Hana, Mina, Greta, Mrs Bell, Mrs Lane"
)
MEN = _split("Tom, Ben, Sam, Leo, Max, Finn, Omar, Jack, Hugo, Paul, Ivan, Noah, Kofi, Luca, Peter, Mr Hill, Mr Reed")
BEASTS = _split("cat, dog, fox, bear, rabbit, mouse, donkey, wolf, duck, goat")
BEAST_KINDS = _split("old, young, little, grey, white, brown, small, lame")
BONDS = _split("friend, cousin, neighbour, brother, uncle, teacher")
WOMEN_BONDS = _split("friend, cousin, neighbour, sister, aunt, teacher")
COLOURS = _split("red, blue, green, yellow, wooden, little, old, round, striped, new, tiny, silver")
TIMES = _split("morning, evening, afternoon, day, night")
MOMENTS = _split(
    "last summer, last winter, long ago, after lunch, before dawn, late at night, on Monday, on Sunday, "
    "in May, early in the spring, after the rain, at noon"
)

GRADED: dict[str, dict[int, tuple[str, ...]]] = {
    "feel": {
        2: _split("delighted, so happy, full of joy, very proud, thrilled, wonderful, loved, truly happy"),
        1: _split("happy, glad, pleased, calm, hopeful, cheerful, safe, at peace, grateful"),
        0: _split("sleepy, ready, busy, quiet, thoughtful, the same as ever, thirsty, wide awake"),
        -1: _split("tired, sad, worried, lonely, bored, upset, nervous, sorry, unhappy, hurt"),
        -2: _split("miserable, terrible, terribly sad, afraid, hated, ashamed, desperate, hopeless, furious"),
    },
    "adverb": {
        2: _split("joyfully, with great joy, with a happy laugh, with love"),
        1: _split("happily, gladly, with a smile, with hope, kindly"),
        0: _split("slowly, quietly, as usual, for an hour, again, without a word"),
        -1: _split("sadly, nervously, with a sigh, in doubt, with regret"),
        -2: _split("in tears, in pain, in terror, with hate, miserably"),
    },
    "quality": {
        2: _split("wonderful, beautiful, perfect, amazing, excellent, great"),
        1: _split("nice, lovely, good, pretty, fine, pleasant"),
        0: _split("quiet, plain, ordinary, still, simple, slow"),
        -1: _split("dull, bad, gloomy, poor, boring, sad"),
        -2: _split("terrible, horrible, awful, dreadful, cruel, nasty"),
    },
    "weather": {
        2: _split("beautiful, glorious, perfect, bright and lovely"),
        1: _split("sunny, warm, fine, pleasant, bright"),
        0: _split("cloudy, windy, cool, dry, misty, snowy"),
        -1: _split("grey, cold, wet, gloomy, rainy"),
        -2: _split("dark, stormy, freezing, terrible, miserable"),
    },
}

OPENING_TEMPLATES: tuple[str, ...] = (
    "{hero} (went|walked|came|ran|hurried) to {place}",
    "{hero} (went|walked|came) to {place} to {task}",
    "{hero} (went|walked|came|ran) to {place} with {friend}",
    "one {time} {hero} (went|set out|walked) to {place}",
    "one {time} {hero} (wanted|decided|began|tried) to {task}",
    "one {time} {hero} found {thing} {at_place}",
    "on a {weather} {time}, {hero} (was|stood|sat|waited) {at_place}",
    "on a {weather} {time}, {hero} began to {task}",
    "it was a {weather} {time} {at_place}, and {hero} (was there|was awake|had to {task})",
    "{moment}, {hero} (went|came|walked) to {place}",
    "{moment}, {hero} (saw|found|met) {critter} {at_place}",
    "{moment}, {hero} and {friend} were {at_place}",
    "{hero} had {thing}",
    "{hero} (saw|met|heard) {critter} {at_place}",
    "{hero} and {friend} (met|sat|stood|worked) {at_place}",
    "{hero} and {friend} (wanted|decided|had) to {task}",
    "every {time}, {hero} (went|walked) to {place} to {task}",
    "there was (a|one) {quality} {time} when {hero} had to {task}",
    "{critter} was {at_place} when {hero} came (by|in)",
    "when {hero} came to {place}, {scene}",
    "the {time} was {weather}, and {hero} (felt|was) {feel}",
    '"let us {task}," said {hero}',
    "{hero} felt {feel} that {time}",
    "in the {quality} old days, {hero} lived near {place}",
)

SIGNS = (-1, 0, 1)

# One kind of sentence is used at most once in a text, so that texts do not go in circles.
MIDDLE_TEMPLATES: dict[str, dict[int, tuple[str, ...]]] = {
    "scene": dict.fromkeys(SIGNS, ("{scene}", "{he} saw that {scene}", "{scene}, and {scene}")),
    "feeling": dict.fromkeys(
        SIGNS,
        (
            "{he} (felt|was) {feel}",
            "it was a {quality} {time}",
            "{he} (sat down|stood still|looked at {place}) and felt {feel}",
            "everything {at_place} was {quality}",
            "{he} was {feel}, and {friend} was {feel}",
            "{he} thought of {thing} and felt {feel}",
        ),
    ),
    "friend": {
        0: (
            "{friend} (came by|walked past|was there too) with {thing}",
            "{he} met {friend} {at_place}",
            "{hero} and {friend} talked about (the weather|the news|{place}|{thing})",
            "{friend} (showed|told) {him} how to {task}",
            "{friend} (sat|stood) next to {him} {at_place}",
        ),
        1: (
            "{friend} (hugged|thanked|helped|praised) {him} {adverb}",
            "{friend} gave {him} (a kind smile|a lovely gift|a warm hug|some good advice)",
            "{hero} and {friend} (laughed|danced|sang|played) {adverb}",
            "{friend} (came to help|saved the day), and {he} was {feel}",
            "{he} loved {friend} like a (sister|brother|best friend)",
        ),
        -1: (
            "{friend} (shouted at|blamed|ignored|hurt|lied to|laughed at) {him} {adverb}",
            "{hero} and {friend} had (a bitter fight|an ugly argument|a bad quarrel)",
            "{friend} was (very ill|angry|in pain|in trouble), and {he} was {feel}",
            "{friend} left {him} alone {at_place}",
            "{he} (hated|feared) {friend} and cried",
        ),
    },
    "thing": {
        0: (
            "{he} put {thing} (by the door|on the table|in a bag|on the floor)",
            "{he} (carried|took|brought) {thing} to {place}",
            "{he} (looked at|picked up|turned over) {thing} {adverb}",
            "there was {thing} {at_place}",
        ),
        1: (
            "{he} (found|made|got) {thing}, and it was {quality}",
            "{friend} had made {thing} as a (gift|present|lovely surprise) for {him}",
            "{he} (loved|enjoyed|treasured) {thing}",
            "{thing} (was {quality}|brought good luck|was the best of all)",
        ),
        -1: (
            "{he} lost {thing} and (cried|was {feel})",
            "{thing} was (broken|ruined|lost|stolen|destroyed)",
            "{he} dropped {thing}, and it hurt {his} foot",
            "{friend} broke {thing} {adverb}",
        ),
    },
    "critter": {
        0: (
            "{critter} (looked on|sat|waited) {at_place}",
            "{critter} went by",
            "{he} saw {critter} and {critter} saw {him}",
            "{he} gave {critter} some (bread|water|seeds)",
        ),
        1: (
            "{critter} (played|danced|sang) {adverb}",
            "{he} made friends with {critter}",
            "{he} (saved|helped|hugged) {critter} {adverb}",
            "{critter} was (funny|cute|sweet|friendly), and {he} laughed",
        ),
        -1: (
            "{critter} (scared|attacked|bit) {him}",
            "{critter} was (hurt|trapped|sick|dead), and {he} cried",
            "{he} heard {critter} (scream|cry) in the (dark|distance)",
            "{he} was afraid of {critter}",
        ),
    },
    "sky": {
        0: (
            "the {time} was {weather}",
            "the wind (rose|fell|turned|came from the (north|south|west))",
            "it (began to rain|began to snow|had rained all {time})",
            "{he} looked (up at|out at) the {weather} sky",
        ),
        1: (
            "the {time} was {weather}, and {he} (smiled|laughed|felt {feel})",
            "the sun came out (and warmed {him}|like an old friend|at last, and {he} smiled)",
            "a {quality} rainbow stood over {place}",
        ),
        -1: (
            "the {time} was {weather}, and {he} (cried|felt {feel}|was {feel})",
            "the {weather} wind (hurt {his} face|scared {him}|made {him} sad)",
            "thunder (scared|shook|frightened) {him}",
        ),
    },
    "thought": {
        0: (
            "{he} thought about (supper|the road home|{friend}|the summer)",
            "{he} remembered (last year|the road|what {friend} had said|an old story)",
            "{he} wondered (what time it was|how to {task}|where {friend} had gone)",
        ),
        1: (
            "{he} remembered {friend} and smiled {adverb}",
            "{he} dreamed of a {quality} (house|journey|future)",
            "{he} hoped for (good luck|a {quality} {time}|more joy), and it came true",
        ),
        -1: (
            "{he} remembered {friend} and wept {adverb}",
            "{he} had a {quality} dream and woke up {feel}",
            "{he} feared (the dark|a {quality} {time}|that {friend} was dead)",
        ),
    },
    "speech": {
        0: (
            '"it is time to {task}," said {friend}',
            "{friend} asked ({him} about|to see|twice about) {thing}",
            '"we can {task} (now|later|at noon)," {he} said',
            "{friend} asked {him} to {task}",
        ),
        1: (
            '"I love this {quality} place," said {friend}',
            '"what a {quality} {time}!" {he} said {adverb}',
            '"thank you, my dear friend!" said {friend}',
            '"(well done|good luck|you are the best)," {friend} told {him}',
        ),
        -1: (
            '"I hate this {quality} place," said {friend}',
            '"what a {quality} {time}," {he} said {adverb}',
            '"this is all your fault!" shouted {friend}',
            '"(go away|I am afraid|nobody loves me)," {he} (said|cried)',
        ),
    },
    "task": {
        0: (
            "{he} (began|started|went on) to {task} {adverb}",
            "{he} had to {task} until (noon|six|dark)",
            "{hero} and {friend} took turns to {task}",
            "{he} stopped to {task}",
        ),
        1: (
            "{he} began to {task} {adverb}, and (it went well|it was fun|everyone was pleased)",
            "{he} was {feel} to {task}",
            "{he} helped {friend} {task}, and the work was {quality}",
            "it was a {quality} (joy|pleasure) to {task}",
        ),
        -1: (
            "{he} tried to {task}, but (it went wrong|it was no use|{he} failed)",
            "{he} was forced to {task} {adverb}",
            "{he} was too {feel} to {task}",
            "{he} hurt {his} (hand|foot|knee) and could not {task}",
        ),
    },
}

TURN_TEMPLATES: tuple[str, ...] = (
    "{he} had been {felt}, but now {he} was {feel}",
    "then everything changed, and it became a {quality} {time}",
    "then {scene}, and {he} was {feel}",
)

ENDING_TEMPLATES: dict[int, tuple[str, ...]] = {
    0: (
        "then {he} (went|walked) home",
        "{he} went home (for supper|to sleep|with {thing}|with {friend})",
        "the next day {he} came back to {place}",
        "(so|and so) the {time} (ended|went by)",
        "after that, {he} (began|went) to {task}",
        "{he} closed the door and slept",
        "{he} was {feel} when the {time} ended",
    ),
    1: (
        "{he} went home {feel}",
        "it was the best {time} of {his} life",
        "from that day on, {he} loved {place}",
        "{he} fell asleep with a (happy|warm|sweet) smile",
        "{hero} and {friend} were (best|good|true|dear) friends from then on",
        "and (all was well|everyone was {feel})",
        "{he} thanked {friend} {adverb}",
        "what a {quality} {time} it was",
    ),
    -1: (
        "{he} went home {feel}",
        "it was the worst {time} of {his} life",
        "{he} never came back to {place} again, for it hurt too much",
        "{he} cried (alone|all night|in the dark)",
        "{he} lost {friend} for ever and was {feel}",
        "nobody came to help, and {he} was {feel}",
        "{he} left {place} {adverb}",
        "what a {quality} {time} it was",
    ),
}

LINKS: dict[str, tuple[str, ...]] = {
    "same": _split("then, soon, after that, later, at the same time, that {time}, a little later"),
    "up": ("but then", "luckily,", "at last", "in spite of that,", "to everyone's surprise,"),
    "end": ("in the end",),
    "down": ("but then", "sadly,", "suddenly", "without warning,", "even so,"),
}
TAILS: dict[int, tuple[str, ...]] = dict.fromkeys(
    SIGNS,
    (
        "and {he} (felt|was) {feel}",
        "and {scene}",
        "while {scene}",
        "as {friend} (looked on|came by|had said)",
        "for it was a {quality} {time}",
    ),
)
