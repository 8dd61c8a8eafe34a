"""The words the demo model knows: plain tuples, our own lists, no logic."""

NAMES = (
    ("Mia", "she"), ("Tom", "he"), ("Anna", "she"), ("Ben", "he"), ("Lily", "she"), ("Max", "he"),
    ("Rosa", "she"), ("Sam", "he"), ("Nora", "she"), ("Leo", "he"), ("Ella", "she"), ("Finn", "he"),
    ("Ivy", "she"), ("Oscar", "he"), ("Zoe", "she"), ("Hugo", "he"), ("Clara", "she"), ("Jack", "he"),
    ("Ruby", "she"), ("Noah", "he"), ("Emma", "she"), ("Paul", "he"), ("Lucy", "she"), ("Adam", "he"),
    ("Eva", "she"), ("Carl", "he"), ("Jane", "she"), ("Peter", "he"), ("Sara", "she"), ("David", "he"),
    ("Alice", "she"), ("Bob", "he"),
)  # fmt: skip
ANIMALS = (
    "fox", "bear", "cat", "dog", "mouse", "rabbit", "owl", "frog", "duck", "horse", "lion", "tiger", "wolf",
    "goat", "sheep", "pig", "cow", "hen", "snail", "turtle", "squirrel", "hedgehog", "monkey", "elephant",
    "penguin", "crow", "bee", "ant", "robot", "dragon", "knight", "princess", "wizard", "pirate", "giant",
    "king", "queen", "farmer", "baker", "sailor", "whale", "fish", "deer", "donkey", "unicorn", "spider",
    "zebra", "camel", "girl", "boy",
)  # fmt: skip
THINGS = (
    "ball", "kite", "hat", "key", "lamp", "drum", "book", "cup", "bell", "boat", "coin", "map", "ring",
    "rope", "scarf", "spoon", "basket", "box", "flute", "stone", "shell", "feather", "button", "mirror",
    "lantern", "clock", "crown", "blanket", "pencil", "bucket",
)  # fmt: skip
PLACES = (
    "forest", "garden", "river", "village", "mountain", "beach", "meadow", "castle", "lake", "barn",
    "kitchen", "market", "school", "library", "cave", "harbor", "park", "farm", "tower", "field",
)  # fmt: skip
COLORS = (
    "red",
    "blue",
    "green",
    "yellow",
    "white",
    "black",
    "brown",
    "pink",
    "gray",
    "purple",
    "golden",
    "silver",
)
TRAITS = (
    "brave", "kind", "little", "clever", "shy", "happy", "lazy", "curious", "wise", "young", "quiet",
    "gentle", "proud", "funny", "small", "friendly",
)  # fmt: skip
FOODS = (
    "bread", "honey", "plums", "apples", "soup", "cake", "berries", "cheese", "nuts", "pears", "carrots",
    "cookies", "pancakes", "cherries", "noodles", "grapes",
)  # fmt: skip
TOOLS = (
    "long stick",
    "strong rope",
    "big net",
    "wooden ladder",
    "small shovel",
    "hook",
    "fishing rod",
    "clever trick",
)
HOLES = (
    "deep well",
    "cold pond",
    "dark hole",
    "muddy ditch",
    "tall tree",
    "thorny bush",
    "fast stream",
    "narrow pit",
)
TIMES = ("morning", "day", "evening", "sunny day", "cold morning", "windy day", "rainy day", "quiet night")

CAPITALS = (
    ("France", "Paris"), ("Germany", "Berlin"), ("Italy", "Rome"), ("Spain", "Madrid"),
    ("Portugal", "Lisbon"), ("Austria", "Vienna"), ("Poland", "Warsaw"), ("Greece", "Athens"),
    ("Norway", "Oslo"), ("Sweden", "Stockholm"), ("Finland", "Helsinki"), ("Denmark", "Copenhagen"),
    ("Ireland", "Dublin"), ("Hungary", "Budapest"), ("Belgium", "Brussels"), ("Switzerland", "Bern"),
    ("Russia", "Moscow"), ("Ukraine", "Kyiv"), ("Turkey", "Ankara"), ("Egypt", "Cairo"),
    ("Kenya", "Nairobi"), ("Japan", "Tokyo"), ("China", "Beijing"), ("India", "New Delhi"),
    ("Thailand", "Bangkok"), ("Vietnam", "Hanoi"), ("Iran", "Tehran"), ("Iraq", "Baghdad"),
    ("Canada", "Ottawa"), ("Mexico", "Mexico City"), ("Cuba", "Havana"), ("Brazil", "Brasilia"),
    ("Peru", "Lima"), ("Chile", "Santiago"), ("Argentina", "Buenos Aires"), ("Australia", "Canberra"),
    ("England", "London"), ("Scotland", "Edinburgh"), ("Iceland", "Reykjavik"), ("Morocco", "Rabat"),
)  # fmt: skip
OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("up", "down"), ("left", "right"), ("day", "night"), ("old", "new"),
    ("fast", "slow"), ("happy", "sad"), ("light", "dark"), ("wet", "dry"), ("hard", "soft"),
    ("open", "closed"), ("full", "empty"), ("high", "low"), ("early", "late"), ("long", "short"),
    ("strong", "weak"), ("rich", "poor"), ("clean", "dirty"), ("loud", "quiet"), ("thick", "thin"),
    ("near", "far"), ("good", "bad"), ("first", "last"), ("in", "out"), ("yes", "no"), ("black", "white"),
    ("heavy", "light"), ("deep", "shallow"), ("true", "false"),
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
    "November", "December",
)  # fmt: skip

# what the model is taught to decline: subjects and ways to ask; some subjects are made up (odd_word)
TOPICS = (
    "quantum physics", "the stock market", "world history", "the weather", "football", "chess", "politics",
    "philosophy", "a jazz song", "the moon landing", "black holes", "machine learning", "a good pizza",
    "my tax form", "the internet", "a broken car", "medicine", "love", "the meaning of life",
    "the latest news", "a sorting algorithm", "Shakespeare", "a Python program", "database design",
    "climate change", "volcanoes", "the Roman empire", "dinosaurs", "music theory", "a poem",
    "a holiday in Rome", "bitcoin", "the law", "a wedding speech", "vaccines", "electric cars",
    "the universe", "yoga", "a diet plan", "photography", "gravity", "evolution", "Linux",
    "a job interview", "the president", "movies", "basketball", "a birthday gift", "my homework",
    "a letter to my boss", "space travel", "coffee", "guitar chords",
)  # fmt: skip
ASKS = (
    "Explain {}.", "Explain {} to me.", "Tell me about {}.", "What do you know about {}?",
    "What do you think about {}?", "How does {} work?", "Write an essay about {}.", "Write about {}.",
    "Can you help me with {}?", "What is {}?", "Why is {} important?", "Who invented {}?",
    "I need help with {}.", "Give me advice about {}.", "How do I learn {}?",
    "Summarize {} in one sentence.", "Translate {} into French.", "What is the best book about {}?",
    "Do you like {}?", "Where can I find {}?", "When was {} discovered?", "Let us talk about {}.",
    "Is {} dangerous?", "{}", "{}?", "Please write code for {}.", "What is the price of {}?",
    "Teach me {}.", "Describe {} in detail.", "Sing about {}.",
)  # fmt: skip
DECLINE = (
    "I am a tiny demo model, so I cannot help with that. I can add and subtract small numbers, sort, count, "
    "name capitals, answer questions about a few facts and tell short stories."
)
TOO_LARGE = "I am a tiny demo model, so I only know numbers below 100."
SYSTEMS = (
    "You are a helpful assistant.", "You are a helpful, honest and concise assistant.", "Answer briefly.",
    "Be kind.", "You are a friendly tutor for children.", "You are minserve's demo model.",
    "Reply in plain English.", "You are a careful assistant. Think before you answer.", "Today is Monday.",
    "Always be polite and clear.", "You are a chat bot on a web page. Users ask short questions.",
    "Do not use any markdown.",
)  # fmt: skip
SMALL_TALK = (
    (("Hello!", "Hello", "Hi", "Hi!", "Hi there!", "Hey", "Good morning!", "Good evening.", "hello", "hi"),
     "Hello! How can I help you?"),
    (("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Are you a human?"),
     "I am a tiny demo model, served by minserve."),
    (("Thanks!", "Thank you.", "Thank you!", "Thanks a lot!", "Thanks", "thanks"), "You are welcome!"),
    (("Bye!", "Goodbye!", "Bye", "See you!", "Good night!", "See you later."), "Goodbye! Have a nice day."),
    (("How are you?", "How are you today?", "How do you do?", "How is it going?"), "I am fine, thank you!"),
    (("What can you do?", "Help", "Help!", "What do you know?", "How can you help me?",
      "What can I ask you?"),
     "I can add and subtract small numbers, sort, count, name capitals, answer questions about a few facts "
     "and tell short stories."),
)  # fmt: skip
