// What picture.py shows in a browser: the panels of a dashboard, drawn by Grafana's own components from answers in `window.BOARD`.
import {
  createTheme, FieldColorModeId, FieldType, getDisplayProcessor, getFieldDisplayValues, dateTime, toDataFrame, VizOrientation,
} from "@grafana/data";
import { BarGauge, BigValue, GlobalStyles, PanelChrome, ThemeContext, TimeSeries, VizRepeater } from "@grafana/ui";
import { createRoot } from "react-dom/client";
import "uplot/dist/uPlot.min.css";

const theme = createTheme({ colors: { mode: "dark" } });
const { board, answers, from, to, margin, heading, cell, gap, columns } = window.BOARD;
const column = (window.innerWidth - 2 * margin) / columns;
const timeRange = { from: dateTime(from), to: dateTime(to), raw: { from: dateTime(from), to: dateTime(to) } };

function setByPath(object, path, value) {
  const [first, ...rest] = path.split(".");
  object[first] = rest.length ? setByPath({ ...object[first] }, rest.join("."), value) : value;
  return object;
}

function config({ defaults, overrides }, name) {
  const applies = ({ id, options }) => (id === "byName" ? options === name : new RegExp(options.slice(1, -1)).test(name));
  const properties = overrides.filter((each) => applies(each.matcher)).flatMap((each) => each.properties);
  return properties.reduce((made, { id, value }) => setByPath(made, id, value), structuredClone(defaults));
}

// A frame a series: its time, and its values under the name that the legend gives them.
function frames(panel) {
  return answers[panel.id].map(({ name, times, values }, seriesIndex) => {
    const frame = toDataFrame({
      fields: [
        { name: "time", type: FieldType.time, values: times },
        { name, type: FieldType.number, values, config: { displayName: name, ...config(panel.fieldConfig, name) } },
      ],
    });
    frame.fields.forEach((field) => {
      field.state = { displayName: field.name, seriesIndex: Math.max(0, seriesIndex) };
      field.display = getDisplayProcessor({ field, theme });
    });
    return frame;
  });
}

function values(panel) {
  const data = frames(panel);
  return getFieldDisplayValues({
    data, theme, fieldConfig: { defaults: {}, overrides: [] }, reduceOptions: panel.options.reduceOptions, replaceVariables: (text) => text,
  });
}

function Timeseries({ panel, width, height }) {
  const drawn = frames(panel);
  if (drawn.length === 0) {
    return <div style={{ width, height, display: "grid", placeItems: "center" }}>No data</div>;
  }
  return <TimeSeries frames={drawn} timeRange={timeRange} timeZone="utc" width={width} height={height} legend={panel.options.legend} options={panel.options} />;
}

function Stat({ panel, width, height }) {
  const { colorMode, graphMode, justifyMode, textMode } = panel.options;
  return (
    <VizRepeater
      source={panel} renderCounter={0} autoGrid orientation={VizOrientation.Auto} width={width} height={height} getValues={() => values(panel)}
      renderValue={({ value, width, height, count }) => (
        <BigValue theme={theme} value={value.display} width={width} height={height} count={count}
          colorMode={colorMode} graphMode={graphMode} justifyMode={justifyMode} textMode={textMode} />
      )}
    />
  );
}

function Bargauge({ panel, width, height }) {
  const shown = values(panel);
  const largest = Math.max(...shown.map(({ display }) => display.numeric));
  const { displayMode, namePlacement, showUnfilled, valueMode, minVizHeight, minVizWidth } = panel.options;
  return (
    <VizRepeater
      source={panel} renderCounter={0} orientation={VizOrientation.Horizontal} width={width} height={height} getValues={() => shown}
      minVizHeight={minVizHeight} minVizWidth={minVizWidth} itemSpacing={10}
      renderValue={({ value, width, height }) => (
        <BarGauge theme={theme} field={{ ...value.field, min: 0, max: largest }} value={value.display} display={value.view?.getFieldDisplayProcessor(value.colIndex)}
          width={width} height={height} orientation={VizOrientation.Horizontal}
          displayMode={displayMode} namePlacement={namePlacement} showUnfilled={showUnfilled} valueDisplayMode={valueMode} />
      )}
    />
  );
}

// A state timeline is one of Grafana's plugins: its numbers stand in for it.
const KINDS = { timeseries: Timeseries, "state-timeline": Timeseries, stat: Stat, bargauge: Bargauge };

function Placed({ panel }) {
  const { x, y, w, h } = panel.gridPos;
  const [width, height] = [w * column - gap, h * cell + (h - 1) * gap];
  const place = { position: "absolute", left: margin + x * column, top: margin + heading + y * (cell + gap), width, height };
  if (panel.type === "row") {
    return <div style={{ ...place, ...theme.typography.h5, paddingTop: 4 }}>⌄ {panel.title}</div>;
  }
  const Kind = KINDS[panel.type];
  return (
    <div style={place}>
      <PanelChrome title={panel.title} description={panel.description} width={width} height={height}>
        {(innerWidth, innerHeight) => <Kind panel={panel} width={innerWidth} height={innerHeight} />}
      </PanelChrome>
    </div>
  );
}

createRoot(document.getElementById("root")).render(
  <ThemeContext.Provider value={theme}>
    <GlobalStyles />
    <div style={{ ...theme.typography.h4, padding: margin }}>{board.title}</div>
    {board.panels.map((panel) => <Placed key={panel.id} panel={panel} />)}
  </ThemeContext.Provider>,
);
