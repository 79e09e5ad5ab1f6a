"""The vocabulary and the plots of the story grammar (`stories`).

A plot is a list of beats, a beat a list of sentences that may stand for one another. Slots: {N} the
hero's name, {He} {he} {him} {his} the hero's pronouns, {a_kind} what the hero is ("a
little girl"), {F} {f_he} {f_him} {f_his} the friend, {place}, {thing} {a_thing} {bare} an object,
{weather}, {food}. Every sentence of a plot may meet every value of its slots, so a plot asks only
what all of them allow.
"""

from __future__ import annotations

GIRLS = (
    "Lily", "Anna", "Mia", "Emma", "Sara", "Lucy", "Rosie", "Nina", "Zoe", "Ella", "Ruby", "Clara",
    "Amy", "Molly", "Daisy", "Sophie", "Grace", "Maya", "Eva", "Alice", "Julia", "Laura", "Kate",
    "Mary", "Jane", "Rose", "Lena", "Nora", "Olivia", "Chloe", "Hannah", "Leah", "Maria", "Sofia",
    "Isabel", "Marta", "Ana", "Aisha", "Fatima", "Yuki", "Mei", "Priya", "Ines", "Elena", "Vera",
    "Heidi", "Greta", "Holly", "Ivy", "Jenny", "Kim", "Linda", "Megan", "Paula", "Sally", "Susan",
    "Tina", "Wendy", "Bella", "Carla", "Dora", "Fiona",
)  # fmt: skip
BOYS = (
    "Tom", "Ben", "Max", "Sam", "Leo", "Jack", "Tim", "Oscar", "Finn", "Noah", "Adam", "Peter",
    "Theo", "Luke", "Henry", "Charlie", "Daniel", "Oliver", "Jake", "Hugo", "John", "James",
    "Paul", "Mark", "David", "Michael", "Robert", "Simon", "Thomas", "William", "George", "Harry",
    "Alex", "Felix", "Anton", "Karl", "Lars", "Ivan", "Omar", "Ali", "Ravi", "Kenji", "Wei", "Juan",
    "Carlos", "Diego", "Marco", "Luca", "Pierre", "Louis", "Eric", "Fred", "Bob", "Bill", "Joe",
    "Nick", "Ryan", "Scott", "Steve", "Toby", "Will", "Zack",
)  # fmt: skip
ANIMALS = (
    "cat", "dog", "rabbit", "mouse", "fox", "bear", "duck", "owl", "frog", "pony", "squirrel",
    "turtle", "hedgehog", "penguin", "lion", "elephant", "monkey", "pig", "lamb", "bird", "kitten",
    "puppy", "dragon", "robot", "bee", "tiger", "whale", "cow", "goat", "horse", "donkey", "wolf",
    "deer", "goose", "hen", "swan", "parrot", "zebra", "giraffe", "panda", "koala", "dolphin",
    "camel", "kangaroo", "unicorn", "dinosaur", "snail", "butterfly", "crow", "sheep", "otter",
)  # fmt: skip
# Heroes who are people, with the kind of name that they bear.
PEOPLE = {
    "king": "boy", "queen": "girl", "prince": "boy", "princess": "girl", "witch": "girl",
    "wizard": "boy", "fairy": "girl", "pirate": "boy", "knight": "boy", "farmer": "boy",
    "giant": "boy", "ghost": "boy", "baker": "boy", "sailor": "boy", "teacher": "girl",
    "doctor": "girl", "painter": "girl", "dancer": "girl",
}  # fmt: skip
PLACES = (
    "in a small village", "in a green valley", "in a town by the sea", "near the forest",
    "on a quiet farm", "in a little red house", "in a house on a hill", "in a cottage by a river",
    "near a big old garden", "by a blue lake",
)  # fmt: skip
OBJECTS = (
    "ball", "kite", "hat", "book", "bell", "drum", "boat", "key", "coin", "lamp", "map", "box",
    "scarf", "flute", "cup", "ring", "basket", "blanket", "star", "flower", "banana", "pencil",
    "shoe", "crown", "doll", "car", "train", "puppet", "umbrella", "bottle", "guitar", "violin",
    "whistle", "mirror", "feather", "shell", "stone", "balloon", "camera", "clock", "compass",
    "candle", "bicycle", "necklace", "spoon", "pillow", "rope", "wheel", "puzzle", "picture",
)  # fmt: skip
OBJECT_ADJECTIVES = ("red", "blue", "green", "yellow", "golden", "silver", "little", "shiny")
FOODS = (
    "cake", "soup", "bread", "honey", "apple pie", "pancakes", "cookies", "strawberries", "cheese",
)  # fmt: skip
WEATHERS = (
    "One sunny morning", "One rainy day", "One windy day", "One cold morning", "One warm afternoon",
    "One bright morning", "One snowy day", "One fine day", "One gray morning", "One afternoon",
)  # fmt: skip
# Plots in which not every weather makes sense.
PLOT_WEATHERS = {
    "storm": ("One gray morning", "One windy day", "One autumn day", "One afternoon", "One day"),
    "garden": ("One sunny morning", "One fine day", "One warm afternoon", "One spring morning"),
    "night": ("One evening", "One quiet evening", "One winter night", "One night"),
    "race": ("One sunny morning", "One fine day", "One warm afternoon", "One bright morning"),
}
OPENINGS = (
    "Once upon a time, there was {a_kind} named {N} who lived {place}.",
    "Once there was {a_kind} called {N}. {He} lived {place}.",
    "{N} was {a_kind} who lived {place}.",
    "{Place} lived {a_kind} named {N}.",
    "Once upon a time, {a_kind} named {N} lived {place}.",
    "There was once {a_kind} called {N} who lived {place}.",
)
CLOSINGS = (
    "From that day on, {N} and {F} were best friends.",
    "That night, {N} fell asleep with a smile.",
    "And {N} never forgot that day.",
    "{N} and {F} laughed all the way home.",
    "It was the best day of the year.",
    "{N} went home happy and slept well.",
    "And they all lived happily ever after.",
    "{N} was very proud that day.",
)

LOST = (
    ("{N} loved {his} {thing} more than anything.", "{N} had {a_thing} and took it everywhere.",
     "{His} favorite toy was {a_thing}."),
    ("{weather}, the {bare} was gone.", "{weather}, {N} could not find the {bare}.",
     "{weather}, {N} lost the {bare} on the way home."),
    ("{He} looked under the bed and behind the door, but it was not there.",
     "{He} looked everywhere and began to cry.", "{He} was so sad that {he} could not eat."),
    ('"Do not worry, I will help you," said {F}.', '{F} came by and said, "Let us look together."',
     '{F} saw {him} and asked, "Why are you sad?" So {he} told {f_him}.'),
    ("They searched until they found the {bare} under a big tree.",
     "At last {F} saw the {bare} shining in the grass.",
     "After a long time, they found the {bare} beside the path."),
    ('"Thank you, {dear_F}!" said {N} and gave {f_him} a big hug.',
     "{N} jumped for joy and thanked {F}.", "{N} shared {his} {food} with {F} to say thank you."),
)  # fmt: skip
LEARN = (
    ("{N} wanted to learn how to {skill}.", "More than anything, {N} wished to {skill}.",
     "{N} could not {skill}, and that made {him} sad."),
    ("{weather}, {he} tried and tried, but it did not work.",
     "{weather}, {he} tried for the first time and fell down.",
     "{weather}, {he} tried, but {he} was afraid and stopped."),
    ('"It is too hard," {he} said.', '"I will never do it," {he} said with a sigh.',
     "{He} sat down and wanted to give up."),
    ('{F} smiled and said, "Try a little every day."', '"Do not give up," said {F}. "I will help."',
     '{F} said, "I was afraid too, but I tried again."'),
    ("So {N} tried again every morning.", "{N} took a deep breath and tried once more.",
     "Day after day, {N} tried with {F} beside {him}."),
    ("Soon {he} could {skill} very well.", "And one day, {he} could {skill}!",
     "At last {he} could {skill}, and everyone cheered."),
)  # fmt: skip
SHARE = (
    ("{weather}, {N} had a table full of {food}.", "{weather}, {N} made a lot of {food}.",
     "{weather}, {N} got some {food} from {his} grandmother."),
    ("{He} wanted to eat everything alone.", "{He} sat under a tree and wanted to eat.",
     '"This is all for me," {he} thought.'),
    ("Then {F} came by and looked hungry.", "Then {he} saw {F}, who had nothing to eat.",
     "But {F} was sitting there, cold and hungry."),
    ("{N} thought for a moment.", "{N} felt sorry for {F}.", "{N} looked at {F} and smiled."),
    ('"Come and share it with me," said {N}.', '"I will share it with you," said {N}.',
     "{N} shared the {food} with {F}."),
    ("They ate together, and that was much better.", "They ate, talked and laughed until evening.",
     'They ate together, and {F} said, "You are very kind."'),
)  # fmt: skip
STORM = (
    ("{N} loved to play outside.", "Every day, {N} went for a long walk.",
     "{N} liked to look for flowers near the forest."),
    ("{weather}, a big storm came.", "{weather}, dark clouds filled the sky.",
     "{weather}, the wind grew strong and it began to thunder."),
    ("{He} was afraid and hid under a tree.", "{He} ran, but {he} could not find the way home.",
     "{He} was wet and cold and did not know where to go."),
    ('"Come in, it is warm here," called {F}.',
     "Then {he} saw a light in the window of {F}'s home.",
     'Then {F} came with a lamp and said, "Follow me!"'),
    ("{F} gave {him} {food} and a warm blanket.", "They sat by the fire and told each other jokes.",
     "Inside, they ate {food} and sang songs."),
    ("When the storm was over, there was a rainbow in the sky.",
     "In the morning, the sun came out again.", "Soon the rain stopped and the birds sang."),
)  # fmt: skip
TREASURE = (
    ("{weather}, {N} found an old map.", "{weather}, {N} found a map in a bottle.",
     "{weather}, {N} saw a strange map on the floor."),
    ('"It shows the way to a treasure!" {he} said.', "A big red cross was on it.",
     '"Let us look for the treasure!" {he} said to {F}.'),
    ("{N} and {F} walked through the forest and over a bridge.",
     "{N} and {F} climbed a hill and crossed a river.",
     "{N} and {F} walked all day and were very tired."),
    ("Under an old tree, they began to dig.", "Behind a waterfall, they saw a dark cave.",
     "At the end of the path, there was a big stone."),
    ("There was a box, and in it was {a_thing}.", "There they found {a_thing}.",
     "And there it was: {a_thing}!"),
    ('"We found it together, so it is ours," said {N}.', '"What a wonderful day!" said {F}.',
     "They carried it home and showed it to everyone."),
)  # fmt: skip
FRIEND = (
    ("{N} had no friends and often felt lonely.", "{N} was shy and always played alone.",
     "{N} was new there and did not know anyone."),
    ("{weather}, {he} heard someone cry.", "{weather}, {he} heard a small voice near the river.",
     "{weather}, {he} saw someone behind a bush."),
    ("It was {F}, who had hurt a foot.", "It was {F}, who was lost.",
     "It was {F}, who was stuck in the mud."),
    ('"Wait, I will help you," said {N}.', "{N} was afraid, but {he} wanted to help.",
     '"Do not be afraid," said {N}.'),
    ("{He} helped {F} and brought {f_him} home.", "{He} worked hard, and soon {F} was safe.",
     "{He} stayed with {F} until everything was well again."),
    ('"Will you play with me tomorrow?" asked {F}.', '{F} gave {him} {a_thing} to say thank you.',
     '"You are my hero," said {F}.'),
)  # fmt: skip
GARDEN = (
    ("{N} found a tiny seed.", "{F} gave {N} a tiny seed.", "{N} had a small brown seed."),
    ("{weather}, {he} put it in the ground.", "{weather}, {he} planted it behind the house.",
     "{weather}, {he} dug a hole and planted it."),
    ("{He} gave it water every day, but nothing happened.",
     "{He} waited and waited, but nothing grew.", "For many days, {he} saw only dark earth."),
    ('"You must be patient," said {F}.', '"Give it time," said {F}.',
     '{F} told {him}, "Good things grow slowly."'),
    ("Then, one morning, there was a little green leaf.", "At last, a small green leaf came out.",
     "Then the rain came, and a green leaf grew."),
    ("Soon it was the most beautiful flower of all.", "In summer, it was a tall yellow sunflower.",
     "It grew into a tree full of sweet red apples."),
)  # fmt: skip
GIFT = (
    ("It was the birthday of {F}.", "{F} had a birthday the next day.",
     "Everyone was happy, for it was {F}'s birthday."),
    ("{N} wanted to give {f_him} something special.", "{N} had no money for a gift.",
     "{N} did not know what to give {f_him}."),
    ("{weather}, {he} went to the market, but everything cost too much.",
     "{weather}, {he} sat down to think.", "{weather}, {he} asked everyone for an idea."),
    ("Then {he} had an idea and made {a_thing}.",
     "Then {he} found {a_thing} at home and made it clean.",
     "So {he} worked all night and made {a_thing}."),
    ('"This is for you," said {N}.', "{He} gave it to {F} with a shy smile.",
     "{N} put it in a box and gave it to {F}."),
    ('"It is the best gift of all!" said {F}.', "{F} was so happy that {f_he} danced.",
     '"You made it yourself? I love it!" said {F}.'),
)  # fmt: skip
NIGHT = (
    ("{N} was afraid of the dark.", "{N} never wanted to sleep without a light.",
     "{N} did not like the night."),
    ("{weather}, the lamp in the house broke.", "{weather}, {he} came home late and it was dark.",
     "{weather}, all the lights went out."),
    ('"I cannot see anything!" {he} cried.', "{He} hid under the blanket.",
     "{His} heart beat fast."),
    ('"Look up," said {F}.', "Then {F} took {him} outside.",
     '{F} said, "Come with me, I will show you something."'),
    ("The sky was full of stars.", "A big round moon shone over the hills.",
     "A thousand stars shone above them."),
    ('"The night is beautiful," said {N}.', "They counted the stars together.",
     "Now {N} was not afraid anymore."),
)  # fmt: skip
RACE = (
    ("{weather}, there was a big race.", "{weather}, {N} and {F} had a race.",
     "{weather}, everyone came to see the race."),
    ("{N} was small and not very fast.", "{N} had never won a race.",
     "{F} was the fastest of all, and {N} knew it."),
    ('"I will do my best," said {N}.', '"I will try," {he} said.', "But {he} wanted to try."),
    ("They ran past the river and up the hill.", "{F} ran ahead, but then {f_he} fell down.",
     "In the middle of the race, {F} fell."),
    ("{N} stopped to help {F}.", "{N} gave {F} a hand.",
     '"Are you hurt?" asked {N} and helped {F} up.'),
    ("They crossed the line together, and everyone cheered.",
     "They came last, but nobody laughed.", "{F} said, \"You are a true winner.\""),
)  # fmt: skip
PLOTS = {
    "lost": LOST, "learn": LEARN, "share": SHARE, "storm": STORM, "treasure": TREASURE,
    "friend": FRIEND, "garden": GARDEN, "gift": GIFT, "night": NIGHT, "race": RACE,
}  # fmt: skip
# Plots that a requested topic brings, and the word that must then appear.
TOPICS = {
    "a lost toy": ("lost", "found"), "a storm": ("storm", "storm"),
    "a treasure": ("treasure", "treasure"), "sharing": ("share", "share"),
    "a friend": ("friend", "friend"), "friendship": ("friend", "friend"),
    "a seed": ("garden", "seed"), "a birthday": ("gift",
    "birthday"),
    "a gift": ("gift", "gift"), "a race": ("race", "race"), "the night": ("night", "night"),
    "the stars": ("night", "star"), "a treasure map": ("treasure", "map"),
}  # fmt: skip
PLOTS_WITH_OBJECT = ("lost", "treasure", "gift")
SKILLS_TO_LEARN = (
    "swim", "dance", "sing", "climb a tree", "paint", "whistle", "read", "play the drum",
    "ride a bike", "bake a cake", "skate", "write",
)  # fmt: skip
