// What is wrong with the page that is open, as a list of sentences; [] is a good page.
(() => {
  const problems = [];
  const say = (element, what) => problems.push(
    `${element.tagName} ${(element.textContent || element.getAttribute("alt") || "").trim().slice(0, 40)}: ${what}`);
  const box = element => element.getBoundingClientRect();
  const scrolls = element => ["auto", "scroll", "hidden"].includes(getComputedStyle(element).overflowX);
  const inside = (element, test) => {
    for (let up = element; up && up !== document.documentElement; up = up.parentElement) if (test(up)) return up;
    return null;
  };
  const shown = element => {
    const { width, height } = box(element);
    return width > 0 && height > 0 && element.checkVisibility({ contentVisibilityAuto: true });
  };

  // Sideways.
  if (document.documentElement.scrollWidth > innerWidth) problems.push("the page scrolls sideways");

  // For who does not see: alternatives, headers, captions, names used once.
  for (const image of document.images) if (!image.getAttribute("alt")) say(image, "no alt");
  for (const svg of document.querySelectorAll("svg"))
    if (svg.getAttribute("role") !== "img" || !svg.getAttribute("aria-label")) say(svg, "no text alternative");
  for (const table of document.querySelectorAll("table")) if (!table.caption) say(table, "no caption");
  for (const header of document.querySelectorAll("th")) if (!header.scope) say(header, "no scope");
  const names = new Set();
  for (const element of document.querySelectorAll("[id]")) {
    if (names.has(element.id)) say(element, `id ${element.id} is there twice`);
    names.add(element.id);
  }

  // Boxes: nothing sticks out of the window, of its section, or of itself, unless that scrolls.
  for (const element of document.querySelectorAll("body *")) {
    if (!shown(element) || element.closest("svg") || element.closest("caption.hidden")) continue;
    const style = getComputedStyle(element);
    const content = element.scrollWidth - element.clientWidth;
    if (style.display !== "inline" && style.display !== "table" && !scrolls(element) && element.clientWidth && content > 1)
      say(element, `its content sticks out by ${content} px`);
    const section = element.parentElement && element.parentElement.closest("section");
    if (section && !inside(element.parentElement, scrolls) && box(element).right > box(section).right + 1)
      say(element, "sticks out of its section");
  }

  // Text in figures: within the figure, and not over other text. Turned text has a box larger than itself.
  for (const svg of document.querySelectorAll("svg")) {
    const texts = [...svg.querySelectorAll("text")].filter(text => text.textContent.trim() && shown(text));
    const upright = texts.filter(text => Math.abs(text.getScreenCTM().b) < 1e-6);
    for (const text of texts)
      if (box(text).right > box(svg).right + 2 || box(text).left < box(svg).left - 2
          || box(text).bottom > box(svg).bottom + 3 || box(text).top < box(svg).top - 3) say(text, "sticks out of its figure");
    upright.forEach((one, place) => {
      for (const other of upright.slice(place + 1)) {
        const [a, b] = [box(one), box(other)];
        // Line boxes are higher than letters.
        const slack = 0.25 * Math.min(a.height, b.height);
        if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
            && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > slack)
          say(one, `overlaps ${other.textContent.trim()}`);
      }
    });
  }

  // Contrast, by WCAG 2.
  const parse = text => {
    const found = /^rgba?\(([\d.]+), ([\d.]+), ([\d.]+)(?:, ([\d.]+))?\)$/.exec(text);
    return found ? [+found[1], +found[2], +found[3], found[4] === undefined ? 1 : +found[4]] : null;
  };
  const luminance = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const ratio = (a, b) => {
    const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  const ground = element => {
    for (let up = element; up; up = up.parentElement) {
      const colour = parse(getComputedStyle(up).backgroundColor);
      if (colour && colour[3] === 1) return colour;
    }
    return matchMedia("(prefers-color-scheme: dark)").matches ? [18, 18, 18, 1] : [255, 255, 255, 1];
  };
  const behind = text => {
    // What lies below is known of what is in view only.
    text.scrollIntoView({ block: "nearest", inline: "center" });
    const { left, top, width, height } = box(text);
    for (const element of document.elementsFromPoint(left + width / 2, top + height / 2)) {
      if (element === text || element.tagName === "tspan" || element.tagName === "text" || element.tagName === "svg") continue;
      if (!text.ownerSVGElement.contains(element)) break;
      const style = getComputedStyle(element);
      const colour = style.fill === "none" ? null : parse(style.fill);
      if (colour && colour[3] === 1 && +style.fillOpacity === 1) return colour;
    }
    return ground(text.ownerSVGElement);
  };
  const judge = (element, colour, back, large) => {
    const found = colour && ratio(colour, back);
    if (!colour) say(element, "its colour cannot be read");
    else if (found < (large ? 3 : 4.5)) say(element, `contrast ${found.toFixed(2)}`);
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const seen = new Set();
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.textContent.trim() || seen.has(element) || !shown(element)) continue;
    seen.add(element);
    if (["STYLE", "SCRIPT", "TITLE", "title", "style"].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.66 && +style.fontWeight >= 700);
    if (element.closest("svg")) judge(element, parse(style.fill), behind(element.closest("text")), large);
    else judge(element, parse(style.color), ground(element), large);
  }
  return problems;
})()
