"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const rows = data.ids.length;
  const perPage = 60;
  const byId = new Map(data.ids.map((id, row) => [String(id), row]));
  const find = (id) => document.getElementById(id);
  const names = data.class_names;
  const className = (label) => (label === null || label === undefined ? "" : names && names[label] !== undefined ? names[label] : String(label));
  const column = (name) => data.columns[name];
  const value = (name, row) => (column(name) ? column(name)[row] : null);

  // Corrections by id: {keep: true | false, label: index}; either key may be missing.
  const store = "lightning_mimic.corrections." + data.key;
  let corrections = new Map();
  try {
    corrections = new Map(JSON.parse(localStorage.getItem(store) || "[]").filter(([id]) => byId.has(id)));
  } catch (error) {
    corrections = new Map(); // the browser blocks local storage
  }
  const remember = () => {
    try {
      localStorage.setItem(store, JSON.stringify([...corrections]));
    } catch (error) {
      // Without local storage, corrections last until the page is closed.
    }
  };
  const correction = (row) => corrections.get(String(data.ids[row])) || {};
  const isKept = (row) => (correction(row).keep !== undefined ? correction(row).keep : data.keep[row] === true);
  const labelOf = (row) => {
    if (correction(row).label !== undefined) return correction(row).label;
    return value("corrected_label", row) !== null ? value("corrected_label", row) : value("label", row);
  };

  const tabs = {
    suspicious: Int32Array.from({ length: rows }, (_, place) => place),
    borderline: Int32Array.from(data.borderline),
    best: Int32Array.from({ length: rows }, (_, place) => rows - 1 - place),
  };
  if (data.compared) tabs.unlike = tabs.suspicious.filter((row) => value("other_keep", row) !== null && value("other_keep", row) !== (data.keep[row] === true));
  const decided = {
    kept: isKept,
    dropped: (row) => !isKept(row),
    here: (row) => data.keep[row] === true && value("other_keep", row) === false,
    there: (row) => data.keep[row] !== true && value("other_keep", row) === true,
  };
  const state = { tab: "suspicious", page: 0, chosen: [], open: -1 };
  const text = (row) => (data.texts[row] || "");

  const make = (tag, className, content) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (content !== undefined) element.textContent = content;
    return element;
  };
  const number = (found, digits) => (found === null || found === undefined ? "none" : Number(found).toPrecision(digits));
  const percent = (found) => (found === null || found === undefined ? "unknown" : (100 * found).toFixed(found > 0.995 || found < 0.005 ? 2 : 1) + " %");

  const choose = () => {
    const search = find("search").value.trim().toLowerCase();
    const decision = find("decision").value;
    const given = find("given").value, predicted = find("predicted").value;
    const order = state.tab === "corrected" ? [...corrections.keys()].map((id) => byId.get(id)) : tabs[state.tab];
    const chosen = [];
    for (const row of order) {
      if (decision && !decided[decision](row)) continue;
      if (given !== "" && value("label", row) !== Number(given)) continue;
      if (predicted !== "" && value("predicted", row) !== Number(predicted)) continue;
      if (search && !String(data.ids[row]).toLowerCase().includes(search) && !text(row).toLowerCase().includes(search)) continue;
      chosen.push(row);
    }
    const sort = find("sort").value;
    if (sort) {
      const key = sort === "id" ? (row) => data.ids[row] : (row) => value(sort, row);
      const last = (found) => found === null || found === undefined;
      chosen.sort((a, b) => {
        const x = key(a), y = key(b);
        if (last(x) || last(y)) return last(x) - last(y);
        return x < y ? -1 : x > y ? 1 : 0;
      });
    }
    state.chosen = chosen;
  };

  const other = (row) => (value("other_keep", row) === null ? "unknown to " : value("other_keep", row) ? "✓ kept by " : "✗ dropped by ") + data.compared[1];
  const picture = (row) => {
    const address = data.images[row];
    if (address) {
      const image = make("img", "picture");
      image.addEventListener("load", () => image.classList.toggle("sharp", image.naturalWidth <= 48));
      image.src = address;
      image.alt = "Sample " + data.ids[row];
      return image;
    }
    return data.has_images ? make("div", "no-picture", "no picture in this page") : null;
  };
  const card = (row) => {
    const kept = isKept(row), byHand = corrections.has(String(data.ids[row]));
    const button = make("button", "card " + (kept ? "kept" : "dropped") + (byHand ? " by-hand" : ""));
    button.type = "button";
    button.dataset.row = row;
    const image = picture(row);
    if (image) button.append(image);
    if (text(row)) button.append(make("span", "text", text(row)));
    button.append(make("span", "mark", (kept ? "✓ kept" : "✗ dropped") + (byHand ? ", by hand" : data.compared ? " by " + data.compared[0] : "")));
    if (data.compared) button.append(make("span", "other", other(row)));
    const facts = make("span", "facts");
    const fact = (name, found) => {
      if (facts.childNodes.length) facts.append(make("br"));
      facts.append(name + " ", make("b", "", found));
    };
    fact("id", String(data.ids[row]));
    if (column("label") && labelOf(row) !== null) fact("given", className(labelOf(row)));
    if (column("predicted") && value("predicted", row) !== null) fact("predicted", className(value("predicted", row)));
    if (column("posterior")) fact("right:", percent(value("posterior", row)));
    else if (column("score")) fact("score", number(value("score", row), 3));
    button.append(facts);
    return button;
  };

  const draw = () => {
    const pages = Math.max(1, Math.ceil(state.chosen.length / perPage));
    state.page = Math.min(Math.max(state.page, 0), pages - 1);
    const first = state.page * perPage;
    const gallery = find("gallery");
    gallery.replaceChildren(...state.chosen.slice(first, first + perPage).map(card));
    gallery.setAttribute("aria-labelledby", "tab-" + state.tab);
    find("count").textContent = state.chosen.length.toLocaleString("en") + (state.chosen.length === 1 ? " sample" : " samples") + (state.chosen.length === rows ? "" : " of the " + rows.toLocaleString("en") + " in this page");
    find("page").textContent = "Page " + (state.page + 1) + " of " + pages;
    find("previous-page").disabled = state.page === 0;
    find("next-page").disabled = state.page === pages - 1;
    find("corrected-count").textContent = corrections.size;
    find("download").disabled = find("discard").disabled = corrections.size === 0;
  };
  const update = () => {
    choose();
    state.page = 0;
    draw();
  };

  const course = (row) => {
    const points = data.courses[row];
    if (!points || points.length < 2) return null;
    const width = 400, height = 110, pad = 18, space = "http://www.w3.org/2000/svg";
    const epochs = points.map((each) => each[0]), scores = points.map((each) => each[1]);
    const left = Math.min(...epochs), right = Math.max(...epochs);
    const low = Math.min(0, ...scores), high = Math.max(0, ...scores);
    const x = (epoch) => pad * 2 + ((epoch - left) / (right - left || 1)) * (width - 3 * pad);
    const y = (score) => height - pad - ((score - low) / (high - low || 1)) * (height - 2 * pad);
    const svg = document.createElementNS(space, "svg");
    const draws = (tag, attributes, content) => {
      const element = document.createElementNS(space, tag);
      for (const [name, found] of Object.entries(attributes)) element.setAttribute(name, found);
      if (content !== undefined) element.textContent = content;
      svg.append(element);
    };
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("class", "course");
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", "Score by epoch: " + points.map(([epoch, score]) => `epoch ${epoch}: ${number(score, 3)}`).join(", "));
    draws("line", { x1: pad * 2, x2: width - pad, y1: y(0), y2: y(0) });
    draws("polyline", { points: points.map(([epoch, score]) => `${x(epoch)},${y(score)}`).join(" ") });
    draws("text", { x: 0, y: y(high) + 4 }, number(high, 2));
    draws("text", { x: 0, y: y(low) + 4 }, number(low, 2));
    draws("text", { x: pad * 2, y: height - 3 }, "epoch " + left);
    draws("text", { x: width - pad, y: height - 3, "text-anchor": "end" }, "epoch " + right);
    return svg;
  };

  const show = (place) => {
    if (place < 0 || place >= state.chosen.length) return;
    state.open = place;
    const row = state.chosen[place], by = correction(row);
    find("detail-title").textContent = "Sample " + data.ids[row];
    const body = find("detail-body"), list = make("dl");
    const image = picture(row), line = course(row);
    const fact = (name, found) => {
      if (found !== null && found !== "") list.append(make("dt", "", name), make("dd", "", found));
    };
    fact("decision", (isKept(row) ? "kept" : "dropped") + (by.keep !== undefined ? " (by hand)" : ""));
    if (data.compared) fact("decision of " + data.compared[1], other(row));
    if (by.keep === undefined) fact("reason", value("reason", row));
    const corrected = labelOf(row) === value("label", row) ? "" : ` → ${className(labelOf(row))} (by hand)`;
    if (column("label")) fact("given label", className(value("label", row)) + corrected);
    if (column("predicted")) fact("predicted label", className(value("predicted", row)));
    if (column("posterior")) fact("probability that the label is right", percent(value("posterior", row)));
    if (column("score")) fact("mean score", number(value("score", row), 4));
    body.replaceChildren(...[image, text(row) ? make("p", "text", text(row)) : null, list, line].filter(Boolean));
    find("relabel").value = by.label !== undefined ? className(by.label) : "";
    find("detail-status").textContent = `${place + 1} of ${state.chosen.length}`;
    find("previous").disabled = place === 0;
    find("next").disabled = place === state.chosen.length - 1;
    if (!find("detail").open) find("detail").showModal();
  };
  const correct = (change) => {
    const row = state.chosen[state.open];
    if (row === undefined) return;
    const id = String(data.ids[row]);
    const found = change === null ? {} : { ...correction(row), ...change };
    const before = value("corrected_label", row) !== null ? value("corrected_label", row) : value("label", row);
    if (found.label === before) delete found.label;
    if (found.keep === (data.keep[row] === true) && found.label === undefined) delete found.keep;
    if (Object.keys(found).length) corrections.set(id, found);
    else corrections.delete(id);
    remember();
    draw();
    show(state.open);
  };
  const relabel = () => {
    const typed = find("relabel").value.trim();
    if (!typed) return;
    let label = names ? names.indexOf(typed) : -1;
    if (label < 0 && !names && /^\d{1,9}$/.test(typed)) label = Number(typed);
    if (label < 0) {
      find("detail-status").textContent = `There is no class ${typed}.`;
      return;
    }
    correct({ label, keep: true });
    find("detail-status").textContent = `Label changed to ${className(label)}.`;
    find("relabel").blur();
  };

  // Quote cells for CSV, and prevent spreadsheets from running them as formulas.
  const cell = (found) => {
    const plain = found === null || found === undefined ? "" : String(found);
    const safe = typeof found === "string" && /^[\s]*[=+\-@\t\r]/.test(plain) ? "'" + plain : plain;
    return /[",\n\r]/.test(safe) ? '"' + safe.replaceAll('"', '""') + '"' : safe;
  };
  const download = () => {
    const lines = ["id,keep,label,label_name"];
    for (const [id, found] of corrections) {
      const name = found.label === undefined ? "" : className(found.label);
      lines.push([data.ids[byId.get(id)], found.keep === undefined ? "" : found.keep, found.label === undefined ? "" : found.label, name].map(cell).join(","));
    }
    const link = make("a");
    link.href = URL.createObjectURL(new Blob([lines.join("\n") + "\n"], { type: "text/csv" }));
    link.download = "corrections.csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };

  const select = (name) => {
    state.tab = name;
    for (const tab of document.querySelectorAll("[data-tab]")) {
      const chosen = tab.dataset.tab === name;
      tab.setAttribute("aria-selected", chosen);
      tab.tabIndex = chosen ? 0 : -1;
    }
    update();
  };
  const filterBy = (given, predicted) => {
    find("filters").reset();
    find("given").value = given === undefined ? "" : given;
    find("predicted").value = predicted === undefined ? "" : predicted;
    select("suspicious");
    find("gallery-section").scrollIntoView();
    find("gallery").focus({ preventScroll: true });
  };

  const fill = (name, labels) => {
    for (const label of labels) {
      const option = make("option", "", className(label));
      option.value = label;
      find(name).append(option);
    }
  };
  const present = (name) => [...new Set(column(name) || [])].filter((label) => label !== null).sort((a, b) => a - b);
  fill("given", present("label"));
  fill("predicted", present("predicted"));
  for (const label of document.querySelectorAll(".of-classes")) label.hidden = !column("label");
  for (const option of [...find("sort").options]) if (["score", "posterior", "label"].includes(option.value) && !column(option.value)) option.remove();
  find("relabel-label").hidden = !column("label");
  for (const name of names || []) {
    const option = make("option");
    option.value = name;
    find("class-list").append(option);
  }
  if (!data.borderline.length) find("tab-borderline").hidden = true;

  for (const tab of document.querySelectorAll("[data-tab]")) tab.addEventListener("click", () => select(tab.dataset.tab));
  document.querySelector("[role=tablist]").addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const shown = [...document.querySelectorAll("[data-tab]:not([hidden])")];
    const next = shown[(shown.indexOf(event.target) + (event.key === "ArrowRight" ? 1 : shown.length - 1)) % shown.length];
    next.focus();
    select(next.dataset.tab);
  });
  for (const button of document.querySelectorAll("button[data-given]")) button.addEventListener("click", () => filterBy(button.dataset.given, button.dataset.predicted));
  find("filters").addEventListener("input", update);
  find("filters").addEventListener("submit", (event) => event.preventDefault());
  find("filters").addEventListener("reset", () => setTimeout(update));
  find("previous-page").addEventListener("click", () => { state.page -= 1; draw(); });
  find("next-page").addEventListener("click", () => { state.page += 1; draw(); });
  find("gallery").addEventListener("click", (event) => {
    const chosen = event.target.closest(".card");
    if (chosen) show(state.chosen.indexOf(Number(chosen.dataset.row)));
  });
  find("download").addEventListener("click", download);
  find("discard").addEventListener("click", () => {
    if (!confirm(`Discard all ${corrections.size} corrections?`)) return;
    corrections.clear();
    remember();
    update();
  });
  const act = {
    previous: () => show(state.open - 1),
    next: () => show(state.open + 1),
    keep: () => correct({ keep: true }),
    drop: () => correct({ keep: false }),
    undo: () => correct(null),
    close: () => find("detail").close(),
  };
  for (const [name, run] of Object.entries(act)) find(name).addEventListener("click", run);
  find("relabel").addEventListener("change", relabel);
  find("detail").addEventListener("close", () => {
    const row = state.chosen[state.open];
    state.page = Math.floor(state.open / perPage);
    draw();
    const chosen = find("gallery").querySelector(`[data-row="${row}"]`);
    if (chosen) chosen.focus();
  });
  const keys = { ArrowLeft: "previous", ArrowRight: "next", k: "keep", d: "drop", u: "undo" };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = ["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName);
    if (find("detail").open) {
      if (typing) return;
      if (event.key === "r" && column("label")) {
        event.preventDefault();
        find("relabel").focus();
      } else if (keys[event.key]) {
        event.preventDefault();
        act[keys[event.key]]();
      }
    } else if (event.key === "/" && !typing) {
      event.preventDefault();
      find("search").focus();
    }
  });
  const log = find("log");
  if (log) {
    log.addEventListener("change", () => {
      for (const each of document.querySelectorAll(".chart .linear")) each.hidden = log.checked;
      for (const each of document.querySelectorAll(".chart .log")) each.hidden = !log.checked;
    });
  }
  update();
})();
