// Sentences of at most 25 words that name their subject. None begins with "This" in front of a verb, and no paragraph
// or item of a list begins with "It". A code span counts as one word; code blocks, tables and
// headings are not read. Published rules count hard-wrapped lines apart, or letters in place of words.
const LONGEST = 25;
const VERBS =
  "is|was|are|were|has|had|have|can|cannot|does|do|will|may|must|holds|means|says|takes|makes|gives|costs|needs|reads|" +
  "works|uses|saves|shows|ends|stops|keeps|applies|happens|lets|brings|runs|covers";
const DANGLING = new RegExp(`^(This|That|These|Those) (${VERBS})\\b`);
const END = /(?<!\b(?:e\.g|i\.e|vs|cf|al|pp|resp))[.!?][)"”]*\s+/g;

/** The text of a paragraph without marks, as pieces: [text, its place in the source]. */
function piecesOf(node, found = []) {
  for (const child of node.children ?? []) {
    if (child.type === "Code") found.push(["code", child.range[0]]);
    else if (child.type === "Str") found.push([child.value.replace(/\n/g, " "), child.range[0]]);
    else if (child.type === "Break") found.push([" ", child.range[0]]);
    else if (child.type !== "Html" && child.type !== "Image") piecesOf(child, found);
  }
  return found;
}

/** Where in the source the character at `position` of the joined pieces stands. */
function sourceOf(pieces, position) {
  let passed = 0;
  for (const [text, start] of pieces) {
    if (position < passed + text.length) return start + (position - passed);
    passed += text.length;
  }
  return pieces.at(-1)[1];
}

export default function (context) {
  const { Syntax, RuleError, report } = context;
  return {
    [Syntax.Paragraph](node) {
      const pieces = piecesOf(node);
      if (!pieces.length) return; // a picture
      const text = pieces.map(([piece]) => piece).join("");
      let begin = 0;
      for (const end of [...text.matchAll(END)].map((match) => match.index + match[0].length).concat(text.length)) {
        const sentence = text.slice(begin, end).trim();
        const words = sentence.split(/\s+/).filter((word) => /[\p{L}\p{N}]/u.test(word)).length;
        const complain = (message) =>
          report(node, new RuleError(`${message}: ${sentence}`, { index: sourceOf(pieces, begin) - node.range[0] }));
        if (words > LONGEST) complain(`${words} words in a sentence, at most ${LONGEST}`);
        if (DANGLING.test(sentence) || (begin === 0 && /^It\b/.test(sentence))) complain("begin with what is meant");
        begin = end;
      }
    },
  };
}
